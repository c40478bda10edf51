"""Tokenizes a dataset into two files, training and validation, and summarizes it for the status."""

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
from qlora_trainer.data.row_encoder import EncodedRow, LengthPolicy, RowCounts, RowEncoder, make_length_policy
from qlora_trainer.data.sources import RowErrors
from qlora_trainer.data.splits import DatasetDigest
from qlora_trainer.data.tokenization import TokenRow
from qlora_trainer.errors import RunError
from qlora_trainer.storage.store import sha256_of

_TRAINING, _HELD_OUT = "train.parquet", "evaluation.parquet"
_PERCENTILES: Final = (50, 95, 99)
_MAX_UNUSABLE: Final = 100_000
"""Hashes that are remembered, which take about 10 MB; where more rows are unusable, others are held out by chance."""
_MAX_LOCATION: Final = 64
"""Characters of a row's file and number in the status."""


@dataclass(frozen=True)
class TokenizedDataset:
    """Two files of token rows in a local folder, which is deleted on exit from the context."""

    folder: Path
    status: DataStatus
    digest: str
    """SHA-256 of the token rows of both splits: the result of all settings that affect the data."""
    longest_row: int
    """Tokens of the longest row, after truncation."""
    largest_token: int
    """The largest token id of any row."""
    rejected: RowErrors = field(default_factory=RowErrors)
    """Rows that are left out as the chat template rejects them."""
    special: RowErrors = field(default_factory=RowErrors)
    """Rows whose own text has a special token of the tokenizer."""
    beside_prompt: int = 0
    """Validation rows that do not begin with the prompt that a server renders."""

    @property
    def training_file(self) -> Path:
        """Return the file of the training rows."""
        return self.folder / _TRAINING

    @property
    def held_out_file(self) -> Path:
        """Return the file of the validation rows."""
        return self.folder / _HELD_OUT

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclass(frozen=True)
class _SplitCounts:
    """Row counts of both splits."""

    training: RowCounts = field(default_factory=RowCounts)
    held_out: RowCounts = field(default_factory=RowCounts)
    unusable: set[bytes] = field(default_factory=set)
    """Hashes of rows of either split that nothing can be learned from, up to _MAX_UNUSABLE."""


class NoHeldOutRowError(RunError):
    """No row is left of those that were held out; `unusable` has these, and others that are no better."""

    def __init__(self, message: str, unusable: frozenset[bytes]) -> None:
        super().__init__(Reason.DATASET_EMPTY, message)
        self.unusable = unusable


def tokenize_dataset(
    dataset: Dataset, scan: DatasetScan, encoder: RowEncoder, training: TrainingSpec, work: Path
) -> TokenizedDataset:
    """Read every row a second time, and write its tokens to the file of its split.

    Raises:
        NoHeldOutRowError: No row is left of those that were held out of the sources.
        RunError: DATASET_INVALID or DATASET_EMPTY.

    """
    folder, counts, policy = work / "tokens" / uuid4().hex, _SplitCounts(), make_length_policy(training)
    try:
        digest = _write(dataset, scan, encoder, policy, folder, counts)
        policy.raise_if_refused()
        _check_rows_left(counts, training, encoder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    splits = (counts.training, counts.held_out)
    return TokenizedDataset(
        folder,
        _describe(dataset, scan, counts, encoder.rejected),
        digest,
        longest_row=max(split.longest for split in splits),
        largest_token=max(split.largest_token for split in splits),
        rejected=encoder.rejected,
        special=encoder.special,
        beside_prompt=counts.held_out.beside_prompt,
    )


def _write(  # noqa: PLR0913, PLR0917 (source, transformation and target of the rows)
    dataset: Dataset, scan: DatasetScan, encoder: RowEncoder, policy: LengthPolicy, folder: Path, counts: _SplitCounts
) -> str:
    """Write both files and return the digest of their rows; these must be the rows that were scanned and split."""
    seen = DatasetDigest()
    with (
        shards.ShardWriter(folder / _TRAINING, with_text=False) as training,
        shards.ShardWriter(folder / _HELD_OUT, with_text=True) as validation,
    ):
        for source, source_weight in zip(dataset.sources, scan.source_weights, strict=True):
            held_out = source_weight.held_out if dataset.held_out is None else frozenset[bytes]()
            for encoded in encoder.encode_rows(source, held_out.__contains__):
                times = source_weight.times(encoded.digest)
                seen.add_training(encoded.digest, times)
                usable = not times or _add(encoded, training, policy, counts.training, times)
                if encoded.digest in held_out:
                    seen.add_held_out(encoded.digest)
                    usable = _add(encoded, validation, policy, counts.held_out)
                if not usable and len(counts.unusable) < _MAX_UNUSABLE:
                    counts.unusable.add(encoded.digest)
        for encoded in encoder.encode_rows(dataset.held_out, lambda _: True) if dataset.held_out else ():
            seen.add_held_out(encoded.digest)
            _add(encoded, validation, policy, counts.held_out)
        if seen.hexdigest() != scan.digest:
            raise RunError(
                Reason.DATASET_INVALID,
                f"{dataset.sources[0].field_ref.field}: rows changed while preparation read them twice; create the "
                "QLoRAJob again when nobody writes to the files",
            )
        return sha256_of(f"{training.digest} {validation.digest}".encode())


def _add(
    encoded: EncodedRow, shard: shards.ShardWriter, policy: LengthPolicy, counts: RowCounts, times: int = 1
) -> bool:
    """Write a row with its parts, and return whether anything of it is left."""
    parts, kept = encoded.parts, 0
    counts.split += times * (len(parts) > 1)
    counts.rejected += not parts
    counts.beside_prompt += any(_is_beside_prompt(part.row) for part in parts)
    for part in parts:
        if row := policy.apply(part, counts, times):
            shard.add(row, times)
            kept += 1
    return kept > 0


def _is_beside_prompt(row: TokenRow) -> bool:
    """Return whether a row begins otherwise than its prompt; the last token may be one that the answer continues."""
    count = len(row.prompt_ids) - 1
    return row.input_ids[: max(count, 0)] != row.prompt_ids[: max(count, 0)]


def _check_rows_left(counts: _SplitCounts, training: TrainingSpec, encoder: RowEncoder) -> None:
    if not counts.training.rows:
        raise RunError(Reason.DATASET_EMPTY, _describe_empty(counts.training, "training", training, encoder))
    if not counts.held_out.rows:
        message = _describe_empty(counts.held_out, "held-out", training, encoder)
        raise NoHeldOutRowError(message, frozenset(counts.unusable))


def _describe_empty(counts: RowCounts, name: str, training: TrainingSpec, encoder: RowEncoder) -> str:
    """Return why no row of a split is left."""
    if not counts.lengths:
        return (
            f"spec.dataset.onInvalidRow: every {name} row is left out, as the chat template rejects it "
            f"({encoder.rejected}); correct the rows, or set spec.dataset.chatTemplate"
        )
    longest = max(counts.lengths)
    also = f", or is rejected by the chat template ({encoder.rejected})" if counts.rejected else ""
    why = (
        f"is longer than {training.max_length} tokens"
        if training.long_rows == "drop"
        else f"has a prompt that fills all {training.max_length} tokens, so nothing of its answer is left"
    )
    return (
        f"spec.training.maxLength: every {name} row {why} (the longest row has {longest}){also}; raise maxLength or "
        "shorten the rows"
    )


def _describe(dataset: Dataset, scan: DatasetScan, counts: _SplitCounts, rejected: RowErrors) -> DataStatus:
    """Summarize the dataset for the status; lengths cover both splits."""
    invalid = RowErrors()
    invalid.extend(scan.invalid)
    invalid.extend(rejected)
    training, held_out = counts.training, counts.held_out
    lengths = np.concatenate([np.asarray(training.lengths), np.asarray(held_out.lengths)])
    p50, p95, p99 = (int(value) for value in np.percentile(lengths, _PERCENTILES, method="higher"))
    return DataStatus(
        digest=scan.digest,
        format=dataset.formats,
        training_rows=training.rows,
        evaluation_rows=held_out.rows,
        training_tokens=training.tokens,
        truncated_rows=training.truncated + held_out.truncated,
        dropped_rows=training.dropped + held_out.dropped,
        invalid_rows=invalid.total,
        invalid_row_numbers=tuple(location[-_MAX_LOCATION:] for location, _ in invalid.first),
        split_rows=training.split + held_out.split,
        longest_row_tokens=int(lengths.max()),
        row_lengths=RowLengths(mean=round(float(lengths.mean()), 1), p50=p50, p95=p95, p99=p99),
    )
