"""The sources of a dataset: what their rows are, row by row, and which rows are broken."""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Final, NamedTuple

from qlora_api.reasons import Reason
from qlora_api.v1alpha1 import DataSource, RowFormat, RowFormatName, RowTemplate
from qlora_trainer.data.file_readers import SUPPORTED_EXTENSIONS, FileError, detect_file_type, is_data_file, read_rows
from qlora_trainer.data.row_formats import detect_format, parse_row
from qlora_trainer.data.rows import Row, RowError
from qlora_trainer.errors import RunError
from qlora_trainer.storage.local_store import FileStore
from qlora_trainer.storage.snapshots import SourceResolver
from qlora_trainer.storage.store import FieldRef, Store, split_uri

_HUB_URI: Final = re.compile(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?/(.*)")


def local_files(resolver: SourceResolver, uri: str, field_ref: FieldRef, work: Path) -> tuple[Path, ...]:
    """Return the local copy of a file, or of every data file below a URI that ends with '/'."""
    if uri.startswith("hf://"):
        return _from_hub(resolver, uri, field_ref, work)
    folder, name = (uri, "") if uri.endswith("/") else split_uri(uri)
    store = resolver.open_store(folder, field_ref)
    names = (entry.path for entry in store.list()) if not name else ()
    return tuple(_local_copy(store, file, work) for file in _select_files(name, names, uri, field_ref))


def _from_hub(resolver: SourceResolver, uri: str, field_ref: FieldRef, work: Path) -> tuple[Path, ...]:
    match = _HUB_URI.fullmatch(uri)
    if match is None:
        raise RunError(
            field_ref.not_found,
            f"{field_ref.field}: '{uri}' has no file; write hf://datasets/organization/name/file.jsonl",
        )
    name, revision, path = match[1], match[2] or "main", match[3]
    wanted = "" if path.endswith("/") else path
    snapshot = resolver.resolve(f"hf://{name}", revision, field_ref, repo_type="dataset")
    if wanted and wanted not in snapshot.files:
        raise RunError(
            field_ref.not_found, f"{field_ref.field}: {name}@{snapshot.commit} has no file '{wanted}'; correct the URI"
        )
    files = _select_files(wanted, (file for file in snapshot.files if file.startswith(path)), uri, field_ref)
    root = snapshot.fetch(files, work)
    return tuple(root / file for file in files)


def _select_files(name: str, names: Iterable[str], uri: str, field_ref: FieldRef) -> tuple[str, ...]:
    """Return the one file that is named, or the data files among all; either must be of a known form."""
    if name:
        try:
            detect_file_type(name)
        except FileError as error:
            raise RunError(
                Reason.DATASET_INVALID,
                f"{field_ref.field}: {error}, or end the URI with '/' to read every file below it",
            ) from error
        return (name,)
    files = tuple(sorted(filter(is_data_file, names)))
    if not files:
        raise RunError(
            field_ref.not_found, f"{field_ref.field}: there is no file below {uri} that is named {SUPPORTED_EXTENSIONS}"
        )
    return files


def _local_copy(store: Store, name: str, work: Path) -> Path:
    """Return where a file is; those of this computer are read in place."""
    if isinstance(store, FileStore):
        return store.path_of(name)
    target = work / "datasets" / hashlib.sha256(store.root.encode()).hexdigest()[:16] / name
    store.download(name, target)
    return target


SHOWN_ROW_ERRORS: Final = 5
"""Broken rows that a message lists; the others are counted."""


class LocatedRow(NamedTuple):
    """A row, and where it is in its source."""

    location: str
    row: Row


@dataclass
class RowErrors:
    """What is wrong with the rows of a source: the first ones in words, all of them counted."""

    first: list[str] = field(default_factory=list)
    total: int = 0

    def add(self, location: str, reason: object) -> None:
        """Note one more."""
        self.total += 1
        if self.total <= SHOWN_ROW_ERRORS:
            self.first.append(f"{location}: {reason}")

    def __str__(self) -> str:
        more = f"; and {self.total - len(self.first)} more" if self.total > len(self.first) else ""
        return "; ".join(self.first) + more


@dataclass(frozen=True)
class Source:
    """Files of one format on this computer."""

    field_ref: FieldRef
    files: tuple[Path, ...]
    row_format: RowFormat
    format_reason: str
    """How the format was told, for the log."""
    template: RowTemplate | None = None
    limit: int | None = None
    weight: float = 1.0

    def rows(self) -> Iterator[LocatedRow]:
        """Yield every row; when they are through, refuse the source if any was broken."""
        problems, seen = RowErrors(), 0
        for place, found in islice(_located_rows(self.files, self.field_ref), self.limit):
            seen += 1
            try:
                if isinstance(found, RowError):
                    raise found
                row = parse_row(found, self.row_format, self.template)
            except RowError as error:
                problems.add(place, error)
            else:
                yield LocatedRow(place, row)
        if problems.total:
            raise RunError(
                Reason.DATASET_INVALID,
                f"{self.field_ref.field}: {problems.total} of {seen} rows cannot be used as {self.row_format} rows. "
                f"{problems}",
            )
        if not seen:
            raise RunError(Reason.DATASET_EMPTY, f"{self.field_ref.field}: the file has no rows; add rows")


def make_source(
    field_ref: FieldRef, files: tuple[Path, ...], source: DataSource, template: RowTemplate | None
) -> Source:
    """Return a source whose format is known, told by its first row where it is not given."""
    row_format, told_by = _detect_format(field_ref, files, source.format, template)
    return Source(field_ref, files, row_format, told_by, template, source.max_samples, source.weight)


def _detect_format(
    field_ref: FieldRef, files: tuple[Path, ...], wanted: RowFormatName, template: RowTemplate | None
) -> tuple[RowFormat, str]:
    if template is not None:
        return "instruction", "as spec.dataset.template renders them"
    if wanted != "auto":
        return wanted, "as the manifest says"
    for place, found in _located_rows(files, field_ref):
        if not isinstance(found, RowError):
            try:
                row_format, name = detect_format(found)
            except RowError as error:
                raise RunError(Reason.DATASET_INVALID, f"{field_ref.field}: {place} {error}") from error
            return row_format, f"told by the field '{name}' of {place}"
    return "instruction", "since no row can be read"


def _located_rows(files: tuple[Path, ...], field_ref: FieldRef) -> Iterator[tuple[str, Mapping[str, Any] | RowError]]:
    """Yield the rows of all files, each with its place; the file is named where there are several."""
    for path in files:
        prefix = f"{path.name} " if len(files) > 1 else ""
        if not path.is_file():
            raise RunError(Reason.DATASET_NOT_FOUND, f"{field_ref.field}: there is no file {path}; correct the URI")
        try:
            for number, content in read_rows(path):
                yield f"{prefix}row {number}", content
        except FileError as error:
            raise RunError(Reason.DATASET_INVALID, f"{field_ref.field}: {path.name} {error}") from error
