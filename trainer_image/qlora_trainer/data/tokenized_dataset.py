"""The token rows of a run, written to files as they are made, with what there is to say about them."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, Self
from uuid import uuid4

import numpy as np

from qlora_api.names import Reason
from qlora_api.v1alpha1 import DataStatus, RowLengths, TrainingSpec
from qlora_trainer.data import shards
from qlora_trainer.data.dataset import Dataset, Survey
from qlora_trainer.data.row_encoder import Encoder, Ruler, Tally, make_ruler
from qlora_trainer.errors import RunError
from qlora_trainer.storage.store import sha256_of

_TRAINING, _HELD_OUT = "train.parquet", "evaluation.parquet"
_PERCENTILES: Final = (50, 95, 99)


@dataclass(frozen=True)
class Tokenised:
    """Two files of token rows in a folder of this computer, gone when the context ends."""

    folder: Path
    status: DataStatus
    digest: str
    """SHA-256 of the token rows of both sides: whatever was asked for, this is what it came to."""

    @property
    def training_file(self) -> Path:
        """Return the rows to learn from."""
        return self.folder / _TRAINING

    @property
    def held_out_file(self) -> Path:
        """Return the rows to be examined on."""
        return self.folder / _HELD_OUT

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclass(frozen=True)
class _Tallies:
    """What became of the rows of both sides."""

    training: Tally = field(default_factory=Tally)
    held_out: Tally = field(default_factory=Tally)


def tokenise(dataset: Dataset, survey: Survey, encoder: Encoder, training: TrainingSpec, work: Path) -> Tokenised:
    """Read every row once more, and write its tokens to the side that it is on."""
    folder, tallies, ruler = work / "tokens" / uuid4().hex, _Tallies(), make_ruler(training)
    try:
        digest = _write(dataset, survey, encoder, ruler, folder, tallies)
        ruler.check()
        _check_some_are_left(tallies.training, "training", training)
        _check_some_are_left(tallies.held_out, "held-out", training)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return Tokenised(folder, _describe(dataset, survey, tallies), digest)


def _write(  # noqa: PLR0913, PLR0917 (where rows come from, what is done with them, where they go)
    dataset: Dataset, survey: Survey, encoder: Encoder, ruler: Ruler, folder: Path, tallies: _Tallies
) -> str:
    """Return the digest of what was written."""
    with (
        shards.ShardWriter(folder / _TRAINING, with_text=False) as learned,
        shards.ShardWriter(folder / _HELD_OUT, with_text=True) as examined,
    ):
        for source, portion in zip(dataset.sources, survey.portions, strict=True):
            examined_here = portion.held_out if dataset.held_out is None else frozenset[bytes]()
            for encoded in encoder.rows(source, examined_here.__contains__):
                times = portion.times(encoded.digest)
                if times and (row := ruler.fit(encoded, tallies.training, times)):
                    learned.add(row, times)
                if encoded.digest in examined_here and (row := ruler.fit(encoded, tallies.held_out)):
                    examined.add(row)
        for encoded in encoder.rows(dataset.held_out, lambda _: True) if dataset.held_out else ():
            if row := ruler.fit(encoded, tallies.held_out):
                examined.add(row)
        return sha256_of(f"{learned.digest} {examined.digest}".encode())


def _check_some_are_left(tally: Tally, name: str, training: TrainingSpec) -> None:
    if tally.rows:
        return
    longest = max(tally.lengths, default=0)
    why = (
        f"is longer than {training.max_length} tokens"
        if training.long_rows == "drop"
        else f"has a prompt that alone fills {training.max_length} tokens, so that nothing of an answer is left"
    )
    raise RunError(
        Reason.DATASET_EMPTY,
        f"spec.training.maxLength: every {name} row {why} (the longest row has {longest}); raise maxLength or shorten "
        "the rows",
    )


def _describe(dataset: Dataset, survey: Survey, tallies: _Tallies) -> DataStatus:
    """Return the facts of the dataset; the lengths are over both sides."""
    learned, examined = tallies.training, tallies.held_out
    lengths = np.concatenate([np.asarray(learned.lengths), np.asarray(examined.lengths)])
    p50, p95, p99 = (int(value) for value in np.percentile(lengths, _PERCENTILES, method="higher"))
    return DataStatus(
        digest=survey.digest,
        format=dataset.formats,
        training_rows=learned.rows,
        evaluation_rows=examined.rows,
        training_tokens=learned.tokens,
        truncated_rows=learned.truncated + examined.truncated,
        dropped_rows=learned.dropped + examined.dropped,
        longest_row_tokens=int(lengths.max()),
        row_lengths=RowLengths(mean=round(float(lengths.mean()), 1), p50=p50, p95=p95, p99=p99),
    )
