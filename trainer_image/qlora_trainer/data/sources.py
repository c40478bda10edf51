"""Sources of a dataset: resolves URIs to local files, detects the row format, and reads and checks the rows."""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import unquote

from qlora_api.object_names import ObjectName
from qlora_api.reasons import Reason
from qlora_api.v1alpha1 import DataSource, RowFormat, RowFormatName, RowTemplate
from qlora_trainer.data.compressed_files import FileError
from qlora_trainer.data.file_readers import SUPPORTED_EXTENSIONS, detect_file_type, is_data_file, read_rows
from qlora_trainer.data.row_formats import detect_format, parse_row
from qlora_trainer.data.rows import Row, RowError, shorten
from qlora_trainer.data.split_names import SelectedFiles, is_pattern, matches_pattern, select_split, split_pattern
from qlora_trainer.errors import RunError
from qlora_trainer.storage.local_store import FileStore
from qlora_trainer.storage.snapshots import SourceResolver
from qlora_trainer.storage.store import EVALUATION_FIELD, FieldRef, Store

_HUB_URI: Final = re.compile(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?/(.*)")


class LocalFiles(NamedTuple):
    """Local paths of the files of a source, and the names of files that belong to another split."""

    paths: tuple[Path, ...]
    left_out: tuple[str, ...] = ()


def local_files(resolver: SourceResolver, uri: str, field_ref: FieldRef, work: Path) -> LocalFiles:
    """Return the local path of a file, of all that a pattern matches, or of all below a URI that ends with '/'."""
    if uri.startswith("hf://"):
        return _from_hub(resolver, uri, field_ref, work)
    folder, name = (uri, "") if uri.endswith("/") else split_pattern(uri)
    store = resolver.open_store(folder, field_ref)
    several = not name or is_pattern(name)
    names = tuple(entry.path for entry in store.list()) if several else ()
    selected = _select_files(name, names, uri, field_ref)
    return LocalFiles(tuple(_local_copy(store, file, work) for file in selected.names), selected.left_out)


def _from_hub(resolver: SourceResolver, uri: str, field_ref: FieldRef, work: Path) -> LocalFiles:
    match = _HUB_URI.fullmatch(uri)
    if match is None:
        raise RunError(
            field_ref.not_found,
            f"{field_ref.field}: '{uri}' has no file; write hf://datasets/organization/name/file.jsonl",
        )
    name, revision, path = match[1], match[2] or "main", match[3]
    snapshot = resolver.resolve(f"hf://{name}", revision, field_ref, repo_type="dataset")
    if path.endswith("/") or not path:
        below = {str(file).removeprefix(path): file for file in snapshot.files if file.startswith(path)}
        selected = _select_files("", tuple(below), uri, field_ref)
        files, left_out = [below[file] for file in selected.names], selected.left_out
    else:
        # A name that was copied from the address of a page has escapes.
        path = path if path in snapshot.files or is_pattern(path) else unquote(path)
        if path not in snapshot.files and not is_pattern(path):
            raise RunError(
                field_ref.not_found,
                f"{field_ref.field}: {name}@{snapshot.commit} has no file '{path}'; correct the URI",
            )
        selected = _select_files(path, snapshot.files, uri, field_ref)
        files, left_out = [ObjectName(file) for file in selected.names], selected.left_out
    root = snapshot.fetch(files, work)
    return LocalFiles(tuple(ObjectName(file).below(root) for file in files), left_out)


def _select_files(name: str, names: Sequence[str], uri: str, field_ref: FieldRef) -> SelectedFiles:
    """Return the named file, or all data files that a pattern matches, or those of the split if no name is given."""
    if name and (not is_pattern(name) or name in names):
        try:
            detect_file_type(name)
        except FileError as error:
            raise RunError(
                Reason.DATASET_INVALID,
                f"{field_ref.field}: {error}, or end the URI with '/' to read every file below it",
            ) from error
        return SelectedFiles((name,), ())
    data = sorted(filter(is_data_file, names))
    files = [file for file in data if matches_pattern(file, name)] if name else data
    if not files:
        what = f"no data file matches {uri}" if name else f"{uri} has no file of type {SUPPORTED_EXTENSIONS}"
        raise RunError(field_ref.not_found, f"{field_ref.field}: {what}; correct the URI")
    # A pattern names the files, of whatever split.
    return (
        SelectedFiles(tuple(files), ())
        if name
        else select_split(files, for_evaluation=field_ref.field == EVALUATION_FIELD.field)
    )


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


MAX_LISTED_ROWS: Final = 20
"""Invalid rows that the log and the report list where they are left out."""
MAX_DROPPED_SHARE: Final = 0.1
"""Share of the rows that may be left out as invalid: if more are, the format of the dataset is another one."""
_SMALL_NUMBER: Final = 5
"""Rows that may be left out of a small dataset, if they are not more than half."""


class LocatedRow(NamedTuple):
    """A row and its location in the source."""

    location: str
    row: Row


@dataclass
class RowErrors:
    """Invalid rows of a source: locations and messages of the first ones, and the total."""

    first: list[tuple[str, str]] = field(default_factory=list)
    total: int = 0

    def add(self, location: str, reason: object) -> None:
        """Add an invalid row."""
        self.total += 1
        if self.total <= MAX_LISTED_ROWS:
            self.first.append((location, shorten(reason)))

    def extend(self, others: "RowErrors") -> None:
        """Add the invalid rows of another source."""
        self.total += others.total
        self.first = [*self.first, *others.first][:MAX_LISTED_ROWS]

    def __str__(self) -> str:
        shown = [f"{location}: {reason}" for location, reason in self.first[:SHOWN_ROW_ERRORS]]
        more = f"; and {self.total - len(shown)} more" if self.total > len(shown) else ""
        return "; ".join(shown) + more


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
    left_out: tuple[str, ...] = ()
    """Files of the folder that belong to another split."""
    drops_invalid: bool = False
    """Whether invalid rows are left out (spec.dataset.onInvalidRow)."""

    def rows(self, problems: RowErrors | None = None) -> Iterator[LocatedRow]:
        """Yield every valid row, and add the others to `problems`.

        After the last one, raise DatasetInvalid if rows were invalid and are not to be left out, or DatasetEmpty.
        """
        problems, seen = RowErrors() if problems is None else problems, 0
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
        self.check_invalid(problems, seen, f"rows cannot be used as {self.row_format} rows")
        if not seen:
            raise RunError(Reason.DATASET_EMPTY, f"{self.field_ref.field}: the file has no rows; add rows")

    def check_invalid(self, problems: RowErrors, seen: int, what: str) -> None:
        """Raise DatasetInvalid if there are invalid rows, or more of them than may be left out."""
        allowed = max(MAX_DROPPED_SHARE * seen, min(_SMALL_NUMBER, seen // 2))
        if not problems.total or (self.drops_invalid and problems.total <= allowed):
            return
        limit = f", more than {MAX_DROPPED_SHARE:.0%}, which onInvalidRow leaves out" if self.drops_invalid else ""
        raise RunError(
            Reason.DATASET_INVALID, f"{self.field_ref.field}: {problems.total} of {seen} {what}{limit}. {problems}"
        )


def make_source(
    field_ref: FieldRef,
    files: tuple[Path, ...],
    source: DataSource,
    template: RowTemplate | None,
    left_out: tuple[str, ...] = (),
) -> Source:
    """Return a source with its row format; auto is resolved by the first valid row."""
    row_format, reason = _detect_format(field_ref, files, source.format, template)
    return Source(field_ref, files, row_format, reason, template, source.max_samples, source.weight, left_out)


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
        except PermissionError as error:
            raise RunError(
                Reason.DATASET_INVALID, f"{field_ref.field}: {path} cannot be read: {error.strerror}; correct it"
            ) from error


def _check_number(rows: int) -> None:
    if rows > MAX_ROWS:
        raise FileError(f"brings the source to more than {MAX_ROWS:,} rows; use several sources, or set maxSamples")
