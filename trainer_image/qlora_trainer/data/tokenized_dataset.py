"""The token rows of a run, written to files as they are made, with what there is to say about them."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, Self
from uuid import uuid4

import numpy as np

from qlora_api.reasons import Reason
from qlora_api.v1alpha1 import DataStatus, RowLengths, TrainingSpec
from qlora_trainer.data import shards
from qlora_trainer.data.dataset import Dataset, DatasetScan
from qlora_trainer.data.row_encoder import LengthPolicy, RowCounts, RowEncoder, make_length_policy
from qlora_trainer.errors import RunError
from qlora_trainer.storage.store import sha256_of

_TRAINING, _HELD_OUT = "train.parquet", "evaluation.parquet"
_PERCENTILES: Final = (50, 95, 99)


@dataclass(frozen=True)
class TokenizedDataset:
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
class _SplitCounts:
    """What became of the rows of both sides."""

    training: RowCounts = field(default_factory=RowCounts)
    held_out: RowCounts = field(default_factory=RowCounts)


def tokenize_dataset(
    dataset: Dataset, scan: DatasetScan, encoder: RowEncoder, training: TrainingSpec, work: Path
) -> TokenizedDataset:
    """Read every row once more, and write its tokens to the side that it is on."""
    folder, tallies, ruler = work / "tokens" / uuid4().hex, _SplitCounts(), make_length_policy(training)
    try:
        digest = _write(dataset, scan, encoder, ruler, folder, tallies)
        ruler.raise_if_refused()
        _check_rows_left(tallies.training, "training", training)
        _check_rows_left(tallies.held_out, "held-out", training)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return TokenizedDataset(folder, _describe(dataset, scan, tallies), digest)


def _write(  # noqa: PLR0913, PLR0917 (where rows come from, what is done with them, where they go)
    dataset: Dataset, scan: DatasetScan, encoder: RowEncoder, policy: LengthPolicy, folder: Path, counts: _SplitCounts
) -> str:
    """Return the digest of what was written."""
    with (
        shards.ShardWriter(folder / _TRAINING, with_text=False) as learned,
        shards.ShardWriter(folder / _HELD_OUT, with_text=True) as examined,
    ):
        for source, portion in zip(dataset.sources, scan.source_weights, strict=True):
            examined_here = portion.held_out if dataset.held_out is None else frozenset[bytes]()
            for encoded in encoder.encode_rows(source, examined_here.__contains__):
                times = portion.times(encoded.digest)
                if times and (row := policy.apply(encoded, counts.training, times)):
                    learned.add(row, times)
                if encoded.digest in examined_here and (row := policy.apply(encoded, counts.held_out)):
                    examined.add(row)
        for encoded in encoder.encode_rows(dataset.held_out, lambda _: True) if dataset.held_out else ():
            if row := policy.apply(encoded, counts.held_out):
                examined.add(row)
        return sha256_of(f"{learned.digest} {examined.digest}".encode())


def _check_rows_left(counts: RowCounts, name: str, training: TrainingSpec) -> None:
    if counts.rows:
        return
    longest = max(counts.lengths, default=0)
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


def _describe(dataset: Dataset, scan: DatasetScan, counts: _SplitCounts) -> DataStatus:
    """Return the facts of the dataset; the lengths are over both sides."""
    learned, examined = counts.training, counts.held_out
    lengths = np.concatenate([np.asarray(learned.lengths), np.asarray(examined.lengths)])
    p50, p95, p99 = (int(value) for value in np.percentile(lengths, _PERCENTILES, method="higher"))
    return DataStatus(
        digest=scan.digest,
        format=dataset.formats,
        training_rows=learned.rows,
        evaluation_rows=examined.rows,
        training_tokens=learned.tokens,
        truncated_rows=learned.truncated + examined.truncated,
        dropped_rows=learned.dropped + examined.dropped,
        longest_row_tokens=int(lengths.max()),
        row_lengths=RowLengths(mean=round(float(lengths.mean()), 1), p50=p50, p95=p95, p99=p99),
    )
