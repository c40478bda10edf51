"""The dataset of a run: its sources, its held-out rows, and what one pass over their content decides."""

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
    """Where rows come from."""

    sources: tuple[Source, ...]
    held_out: Source | None
    """Rows to be examined on, where they have a place of their own; otherwise a share of the sources is held out."""

    @property
    def formats(self) -> str:
        """Return the formats of all rows."""
        return "+".join(sorted({source.row_format for source in self.all_sources}))

    @property
    def all_sources(self) -> tuple[Source, ...]:
        """Return every source, the held-out one last."""
        return (*self.sources, *((self.held_out,) if self.held_out else ()))


def open_dataset(spec: QLoRAJobSpec, resolver: SourceResolver, work: Path) -> Dataset:
    """Bring the files onto this computer, and tell the format of each source."""
    dataset, template = spec.dataset, spec.dataset.template
    sources = []
    for field, source in dataset.sources_by_field:
        owner = FieldRef(DATASET_FIELD.role, field)
        files = local_files(resolver, source.uri, owner, work)
        sources.append(make_source(owner, files, source, template))
    uri = dataset.evaluation.uri
    if uri is None:
        return Dataset(tuple(sources), None)
    # Beside a single source, held-out rows are read as that source is; beside several, each tells its own format.
    alike = len(sources) == 1
    source = DataSource(uri=uri, format=sources[0].row_format if alike else dataset.format)
    held_out = make_source(EVALUATION_FIELD, local_files(resolver, uri, EVALUATION_FIELD, work), source, template)
    told_by = f"read as {sources[0].field_ref.field} is" if alike else held_out.format_reason
    return Dataset(tuple(sources), replace(held_out, format_reason=told_by))


@dataclass(frozen=True)
class DatasetScan:
    """What the content of all rows decides."""

    source_weights: tuple[SourceWeight, ...]
    """One for each source."""
    digest: str
    training_rows: int
    """With those that an epoch sees more than once."""
    held_out_rows: int


def scan_rows(dataset: Dataset, fraction: float) -> DatasetScan:
    """Read and check every row once; of each only its hash is kept."""
    digests = [_digests(source) for source in dataset.sources]
    if dataset.held_out is None:
        held_out = split_validation(digests, fraction, DATASET_FIELD)
        examined = [digest for rows in digests for digest in rows if digest in held_out]
    else:
        examined = _digests(dataset.held_out)
        held_out = frozenset(examined)
    portions = tuple(
        make_source_weight(rows, source.weight, held_out) for rows, source in zip(digests, dataset.sources, strict=True)
    )
    check_training_rows_left(digests, portions, DATASET_FIELD)
    return DatasetScan(
        portions,
        dataset_digest(training_digests(digests, portions), examined),
        sum(1 for _ in training_digests(digests, portions)),
        len(examined),
    )


def _digests(source: Source) -> list[bytes]:
    return [placed.row.digest for placed in source.rows()]


def check_loss(loss: str, dataset: Dataset) -> None:
    """Refuse to look for answers in plain text."""
    text = next((source for source in dataset.all_sources if source.row_format == "text"), None)
    if text is not None and loss not in {"auto", "all"}:
        raise RunError(
            Reason.INVALID_SPEC,
            f"spec.training.loss: {loss} needs rows with an answer, and {text.field_ref.field} has text rows; set "
            "auto or "
            "all, or give rows with a prompt and a completion",
        )


def describe_sources(dataset: Dataset) -> Iterator[str]:
    """Yield a sentence on each source: what its rows were taken for, and why."""
    for source in dataset.all_sources:
        more = f" and {len(source.files) - 1} more" if len(source.files) > 1 else ""
        weight = f", weight {source.weight:g}" if source.weight != 1 else ""
        yield (
            f"{source.field_ref.field}: {source.files[0].name}{more}: {source.row_format} rows, "
            f"{source.format_reason}{weight}"
        )


def describe_lengths(status: DataStatus, training: TrainingSpec) -> Iterator[str]:
    """Yield sentences about the rows' lengths, and about those that were cut or left out."""
    yield f"{status.training_tokens:,} tokens to learn from; the longest row has {status.longest_row_tokens:,}"
    if lengths := status.row_lengths:
        yield (
            f"tokens per row: mean {lengths.mean:g}, half up to {lengths.p50:,}, 95% up to {lengths.p95:,}, "
            f"99% up to {lengths.p99:,}"
        )
    if status.truncated_rows:
        yield f"{status.truncated_rows:,} rows are cut at {training.max_length:,} tokens"
    if status.dropped_rows:
        yield (
            f"{status.dropped_rows:,} rows are left out: they have more than {training.max_length:,} tokens, or "
            "nothing of an answer within these"
        )
