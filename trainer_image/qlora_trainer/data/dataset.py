"""The dataset of a run: its sources, its validation set, and the scan that splits and counts the rows."""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, NamedTuple

from qlora_api.reasons import Reason
from qlora_api.v1alpha1 import DataSource, DataStatus, QLoRAJobSpec, TrainingSpec
from qlora_trainer.data.rows import group_of
from qlora_trainer.data.sources import RowErrors, Source, local_files, make_source
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
    for path, source in dataset.sources_by_field:
        field_ref = FieldRef(DATASET_FIELD.role, path)
        files = local_files(resolver, source.uri, field_ref, work)
        sources.append(make_source(field_ref, files.paths, source, template, files.left_out))
    sources = [replace(source, drops_invalid=dataset.on_invalid_row == "drop") for source in sources]
    uri = dataset.evaluation.uri
    if uri is None:
        return Dataset(tuple(sources), None)
    # With a single source, the validation set has its format; with several, the format is detected.
    same_format = len(sources) == 1
    source = DataSource(uri=uri, format=sources[0].row_format if same_format else dataset.format)
    files = local_files(resolver, uri, EVALUATION_FIELD, work)
    held_out = make_source(EVALUATION_FIELD, files.paths, source, template, files.left_out)
    reason = f"same format as {sources[0].field_ref.field}" if same_format else held_out.format_reason
    drops_invalid = dataset.on_invalid_row == "drop"
    return Dataset(tuple(sources), replace(held_out, format_reason=reason, drops_invalid=drops_invalid))


@dataclass(frozen=True)
class DatasetScan:
    """Split, weights and digest of a dataset, computed from the content of all rows."""

    source_weights: tuple[SourceWeight, ...]
    """One for each source."""
    digest: str
    training_rows: int
    """Rows in an epoch; a row that is repeated counts each time."""
    held_out_rows: int
    sentences: tuple[str, ...] = ()
    """Log lines about the split."""
    invalid: RowErrors = field(default_factory=RowErrors)
    """Rows that are left out as they cannot be used."""


def scan_rows(dataset: Dataset, fraction: float, unusable: frozenset[bytes] = frozenset()) -> DatasetScan:
    """Read and check every row once; only hashes stay in memory.

    Args:
        dataset: The sources.
        fraction: Share of the rows to hold out.
        unusable: Hashes of rows that are not held out, as nothing could be evaluated on them.

    """
    scanned, invalid = [_scan(source) for source in dataset.sources], RowErrors()
    digests = [source.digests for source in scanned]
    sentences: tuple[str, ...] = ()
    if dataset.held_out is None:
        usable = [source.without(unusable) for source in scanned] if unusable else scanned
        groups = [source.groups for source in usable]
        split = split_validation([source.digests for source in usable], groups, fraction, DATASET_FIELD)
        held_out = split.held_out
        validation = [digest for rows in digests for digest in rows if digest in held_out]
        sentences = () if split.by_question else (_ONE_QUESTION,)
    else:
        separate = _scan(dataset.held_out)
        validation = separate.digests
        held_out = frozenset(validation)
        sentences = tuple(_describe_overlap(scanned, separate, held_out))
        invalid.extend(separate.invalid)
    for source in scanned:
        invalid.extend(source.invalid)
    source_weights = tuple(
        make_source_weight(rows, source.weight, held_out) for rows, source in zip(digests, dataset.sources, strict=True)
    )
    check_training_rows_left(digests, source_weights, DATASET_FIELD)
    return DatasetScan(
        source_weights,
        dataset_digest(training_digests(digests, source_weights), validation),
        sum(1 for _ in training_digests(digests, source_weights)),
        len(validation),
        sentences,
        invalid,
    )


_ONE_QUESTION: Final = (
    "most rows share their prompts with many others, so held-out rows have prompts of training rows; "
    "spec.dataset.evaluation.uri names a separate validation set"
)


class _ScannedSource(NamedTuple):
    """Content hash and group of each row, and the rows that are left out."""

    digests: list[bytes]
    groups: "array[int]"
    invalid: RowErrors

    def without(self, left_out: frozenset[bytes]) -> "_ScannedSource":
        """Return the source without some of its rows."""
        indices = [index for index, digest in enumerate(self.digests) if digest not in left_out]
        return self._replace(
            digests=[self.digests[index] for index in indices],
            groups=array("Q", (self.groups[index] for index in indices)),
        )


def _scan(source: Source) -> _ScannedSource:
    scanned = _ScannedSource([], array("Q"), RowErrors())
    for located in source.rows(scanned.invalid):
        scanned.digests.append(located.row.digest)
        scanned.groups.append(group_of(located.row))
    return scanned


def _describe_overlap(
    training: Sequence[_ScannedSource], separate: _ScannedSource, held_out: frozenset[bytes]
) -> Iterator[str]:
    """Yield a log line if training rows have the prompt, but not the answer, of rows of the separate validation set."""
    questions = frozenset(separate.groups)
    overlap = sum(
        group in questions and digest not in held_out
        for source in training
        for digest, group in zip(source.digests, source.groups, strict=True)
    )
    if overlap:
        yield f"{overlap:,} training rows have the prompt of a held-out row; remove them unless that is intended"


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
        if source.left_out:
            shown = ", ".join(source.left_out[:3]) + (" …" if len(source.left_out) > 3 else "")
            yield (
                f"{source.field_ref.field}: {len(source.left_out)} files are of another split, and are not read: "
                f"{shown}; name them in the URI to use them"
            )


def describe_invalid(invalid: RowErrors) -> Iterator[str]:
    """Yield log lines about rows that are left out as they cannot be used."""
    if invalid.total:
        yield f"{invalid.total:,} rows cannot be used and are left out (spec.dataset.onInvalidRow), the first of them:"
    for location, reason in invalid.first:
        yield f"left out, {location}: {reason}"


def describe_lengths(status: DataStatus, training: TrainingSpec) -> Iterator[str]:
    """Yield log lines about row lengths, and about truncated and dropped rows."""
    yield f"{status.training_tokens:,} training tokens; the longest row has {status.longest_row_tokens:,}"
    if lengths := status.row_lengths:
        yield (
            f"tokens per row: mean {lengths.mean:g}, median {lengths.p50:,}, 95th percentile {lengths.p95:,}, "
            f"99th percentile {lengths.p99:,}"
        )
    if status.split_rows:
        yield (
            f"{status.split_rows:,} conversations are split: the chat template rewrites earlier answers once a "
            "conversation goes on, so each such answer is a row of its own, which ends with it"
        )
    if status.truncated_rows:
        yield f"{status.truncated_rows:,} rows are truncated to {training.max_length:,} tokens"
    if status.dropped_rows:
        yield (
            f"{status.dropped_rows:,} rows are dropped: they have more than {training.max_length:,} tokens, or "
            "their answer lies beyond them"
        )
