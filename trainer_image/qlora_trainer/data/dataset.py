"""The dataset of a run: its sources, its validation set, and the scan that splits and counts the rows."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from qlora_api.reasons import Reason
from qlora_api.v1alpha1 import DataSource, DataStatus, QLoRAJobSpec, TrainingSpec
from qlora_trainer.data.sources import Source, local_files, make_source
from qlora_trainer.data.splits import (
    SourceWeight,
    check_training_rows_left,
    dataset_digest,
    make_source_weight,
    split_validation,
    training_digests,
)
from qlora_trainer.errors import RunError
from qlora_trainer.storage.snapshots import SourceResolver
from qlora_trainer.storage.store import DATASET_FIELD, EVALUATION_FIELD, FieldRef


@dataclass(frozen=True)
class Dataset:
    """The training sources, and the validation source if there is one."""

    sources: tuple[Source, ...]
    held_out: Source | None
    """Validation set with a URI of its own; None if a fraction of the sources is held out."""

    @property
    def formats(self) -> str:
        """Return the row formats in use, sorted and joined by '+'."""
        return "+".join(sorted({source.row_format for source in self.all_sources}))

    @property
    def all_sources(self) -> tuple[Source, ...]:
        """Return every source, the held-out one last."""
        return (*self.sources, *((self.held_out,) if self.held_out else ()))


def open_dataset(spec: QLoRAJobSpec, resolver: SourceResolver, work: Path) -> Dataset:
    """Download the files and detect the row format of each source."""
    dataset, template = spec.dataset, spec.dataset.template
    sources = []
    for field, source in dataset.sources_by_field:
        field_ref = FieldRef(DATASET_FIELD.role, field)
        files = local_files(resolver, source.uri, field_ref, work)
        sources.append(make_source(field_ref, files, source, template))
    uri = dataset.evaluation.uri
    if uri is None:
        return Dataset(tuple(sources), None)
    # With a single source, the validation set has its format; with several, the format is detected.
    same_format = len(sources) == 1
    source = DataSource(uri=uri, format=sources[0].row_format if same_format else dataset.format)
    held_out = make_source(EVALUATION_FIELD, local_files(resolver, uri, EVALUATION_FIELD, work), source, template)
    reason = f"same format as {sources[0].field_ref.field}" if same_format else held_out.format_reason
    return Dataset(tuple(sources), replace(held_out, format_reason=reason))


@dataclass(frozen=True)
class DatasetScan:
    """Split, weights and digest of a dataset, computed from the content of all rows."""

    source_weights: tuple[SourceWeight, ...]
    """One for each source."""
    digest: str
    training_rows: int
    """Rows in an epoch; a row that is repeated counts each time."""
    held_out_rows: int


def scan_rows(dataset: Dataset, fraction: float) -> DatasetScan:
    """Read and check every row once; only hashes stay in memory."""
    digests = [_digests(source) for source in dataset.sources]
    if dataset.held_out is None:
        held_out = split_validation(digests, fraction, DATASET_FIELD)
        validation = [digest for rows in digests for digest in rows if digest in held_out]
    else:
        validation = _digests(dataset.held_out)
        held_out = frozenset(validation)
    source_weights = tuple(
        make_source_weight(rows, source.weight, held_out) for rows, source in zip(digests, dataset.sources, strict=True)
    )
    check_training_rows_left(digests, source_weights, DATASET_FIELD)
    return DatasetScan(
        source_weights,
        dataset_digest(training_digests(digests, source_weights), validation),
        sum(1 for _ in training_digests(digests, source_weights)),
        len(validation),
    )


def _digests(source: Source) -> list[bytes]:
    return [located.row.digest for located in source.rows()]


def check_loss(loss: str, dataset: Dataset) -> None:
    """Raise InvalidSpec if the loss needs answers and a source has plain text."""
    text = next((source for source in dataset.all_sources if source.row_format == "text"), None)
    if text is not None and loss not in {"auto", "all"}:
        raise RunError(
            Reason.INVALID_SPEC,
            f"spec.training.loss: {loss} needs rows with an answer, and {text.field_ref.field} has text rows; set "
            "auto or all, or use rows with a prompt and a completion",
        )


def describe_sources(dataset: Dataset) -> Iterator[str]:
    """Yield one log line per source: file, row format and how it was determined."""
    for source in dataset.all_sources:
        more = f" and {len(source.files) - 1} more" if len(source.files) > 1 else ""
        weight = f", weight {source.weight:g}" if source.weight != 1 else ""
        yield (
            f"{source.field_ref.field}: {source.files[0].name}{more}: {source.row_format} rows, "
            f"{source.format_reason}{weight}"
        )


def describe_lengths(status: DataStatus, training: TrainingSpec) -> Iterator[str]:
    """Yield log lines about row lengths, and about truncated and dropped rows."""
    yield f"{status.training_tokens:,} training tokens; the longest row has {status.longest_row_tokens:,}"
    if lengths := status.row_lengths:
        yield (
            f"tokens per row: mean {lengths.mean:g}, median {lengths.p50:,}, 95th percentile {lengths.p95:,}, "
            f"99th percentile {lengths.p99:,}"
        )
    if status.truncated_rows:
        yield f"{status.truncated_rows:,} rows are truncated to {training.max_length:,} tokens"
    if status.dropped_rows:
        yield (
            f"{status.dropped_rows:,} rows are dropped: they have more than {training.max_length:,} tokens, or "
            "their answer lies beyond them"
        )
