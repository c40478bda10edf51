"""Sources of a dataset: resolves URIs to local files, detects the row format, and reads and checks the rows."""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Final, NamedTuple

from qlora_api.object_names import ObjectName
from qlora_api.reasons import Reason
from qlora_api.v1alpha1 import DataSource, RowFormat, RowFormatName, RowTemplate
from qlora_trainer.data.file_readers import SUPPORTED_EXTENSIONS, FileError, detect_file_type, is_data_file, read_rows
from qlora_trainer.data.row_formats import detect_format, parse_row
from qlora_trainer.data.rows import Row, RowError, shorten
from qlora_trainer.errors import RunError
from qlora_trainer.storage.local_store import FileStore
from qlora_trainer.storage.snapshots import SourceResolver
from qlora_trainer.storage.store import FieldRef, Store, split_uri

_HUB_URI: Final = re.compile(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?/(.*)")


def local_files(resolver: SourceResolver, uri: str, field_ref: FieldRef, work: Path) -> tuple[Path, ...]:
    """Return the local path of a file, or of every data file below a URI that ends with '/'."""
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
    file_name = "" if path.endswith("/") else path
    snapshot = resolver.resolve(f"hf://{name}", revision, field_ref, repo_type="dataset")
    if file_name and file_name not in snapshot.files:
        raise RunError(
            field_ref.not_found,
            f"{field_ref.field}: {name}@{snapshot.commit} has no file '{file_name}'; correct the URI",
        )
    files = _select_files(file_name, (file for file in snapshot.files if file.startswith(path)), uri, field_ref)
    root = snapshot.fetch(files, work)
    return tuple(ObjectName(file).below(root) for file in files)


def _select_files(name: str, names: Iterable[str], uri: str, field_ref: FieldRef) -> tuple[str, ...]:
    """Return the named file, or all data files if no name is given; raise if the type is not supported."""
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
            field_ref.not_found, f"{field_ref.field}: {uri} has no file of type {SUPPORTED_EXTENSIONS}; correct the URI"
        )
    return files


def _local_copy(store: Store, name: str, work: Path) -> Path:
    """Download a file and return its path; files of a local folder are read in place."""
    if isinstance(store, FileStore):
        return store.path_of(name)
    folder = ObjectName(hashlib.sha256(store.root.encode()).hexdigest()[:16]).below(work / "datasets")
    target = ObjectName(name).below(folder)
    store.download(name, target)
    return target


MAX_ROWS: Final = 20_000_000
"""Rows of a source: their hashes take 1.5 GiB of the prepare pod's 4, and its hour tokenizes fewer."""
SHOWN_ROW_ERRORS: Final = 5
"""Invalid rows that a message lists; the others are only counted."""


class LocatedRow(NamedTuple):
    """A row and its location in the source."""

    location: str
    row: Row


@dataclass
class RowErrors:
    """Invalid rows of a source: messages of the first ones, and the total."""

    first: list[str] = field(default_factory=list)
    total: int = 0

    def add(self, location: str, reason: object) -> None:
        """Add an invalid row."""
        self.total += 1
        if self.total <= SHOWN_ROW_ERRORS:
            self.first.append(f"{location}: {shorten(reason)}")

    def __str__(self) -> str:
        more = f"; and {self.total - len(self.first)} more" if self.total > len(self.first) else ""
        return "; ".join(self.first) + more


@dataclass(frozen=True)
class Source:
    """Local files with rows of one format."""

    field_ref: FieldRef
    files: tuple[Path, ...]
    row_format: RowFormat
    format_reason: str
    """How the format was determined, for the log."""
    template: RowTemplate | None = None
    limit: int | None = None
    weight: float = 1.0

    def rows(self) -> Iterator[LocatedRow]:
        """Yield every valid row; after the last one, raise DatasetInvalid if any row was invalid, or DatasetEmpty."""
        problems, seen = RowErrors(), 0
        for location, found in islice(_located_rows(self.files, self.field_ref), self.limit):
            seen += 1
            try:
                if isinstance(found, RowError):
                    raise found
                row = parse_row(found, self.row_format, self.template)
            except RowError as error:
                problems.add(location, error)
            else:
                yield LocatedRow(location, row)
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
    """Return a source with its row format; auto is resolved by the first valid row."""
    row_format, reason = _detect_format(field_ref, files, source.format, template)
    return Source(field_ref, files, row_format, reason, template, source.max_samples, source.weight)


def _detect_format(
    field_ref: FieldRef, files: tuple[Path, ...], requested: RowFormatName, template: RowTemplate | None
) -> tuple[RowFormat, str]:
    if template is not None:
        return "instruction", "rendered by spec.dataset.template"
    if requested != "auto":
        return requested, "set in the manifest"
    for location, found in _located_rows(files, field_ref):
        if not isinstance(found, RowError):
            try:
                row_format, name = detect_format(found)
            except RowError as error:
                raise RunError(Reason.DATASET_INVALID, f"{field_ref.field}: {location} {shorten(error)}") from error
            return row_format, f"detected by the field '{name}' of {location}"
    return "instruction", "the default, as no row can be read"


def _located_rows(files: tuple[Path, ...], field_ref: FieldRef) -> Iterator[tuple[str, Mapping[str, Any] | RowError]]:
    """Yield the rows of all files with their locations, which name the file if there are several."""
    rows = 0
    for path in files:
        prefix = f"{path.name} " if len(files) > 1 else ""
        if not path.is_file():
            raise RunError(Reason.DATASET_NOT_FOUND, f"{field_ref.field}: there is no file {path}; correct the URI")
        try:
            for number, content in read_rows(path):
                yield f"{prefix}row {number}", content
                rows += 1
                _check_number(rows)
        except FileError as error:
            raise RunError(Reason.DATASET_INVALID, f"{field_ref.field}: {path.name} {shorten(error)}") from error


def _check_number(rows: int) -> None:
    if rows > MAX_ROWS:
        raise FileError(f"brings the source to more than {MAX_ROWS:,} rows; use several sources, or set maxSamples")
