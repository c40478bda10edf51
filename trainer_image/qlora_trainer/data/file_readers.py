"""Streaming readers of data files, selected by file extension; no reader loads a file into memory."""

import contextlib
import csv
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import IO, Any, Final, NamedTuple, TextIO, cast

from qlora_api.foreign_files import read_start
from qlora_api.units import GIB, MIB
from qlora_api.untrusted_json import MAX_NESTING, MAX_VALUES, TooManyValuesError, check_values, is_nested_deeper
from qlora_trainer.data.columnar_values import count_values
from qlora_trainer.data.compressed_files import COMPRESSED_SUFFIXES, FileError, check_content, open_bytes
from qlora_trainer.data.rows import MAX_ROW_BYTES, RowError, kind_of
from qlora_trainer.runtime.resource_limits import memory_limit

MAX_COLUMNS: Final = 10_000
"""Columns of a table; each is a field of every row, and a dataset has a handful."""
MAX_READ_BYTES: Final = GIB
"""Memory that one read of a columnar file may take, a quarter of the prepare pod's: an honest page has about 1 MiB, but
a few hundred bytes may declare gigabytes (a dictionary, a run of nulls, a compressed page)."""
_CHUNK_CHARACTERS: Final = 1 << 18
_BATCH_ROWS: Final = 256
"""Rows of a columnar file that are converted to Python objects at a time; fewer if they are large."""
_BATCH_BYTES: Final = 64 * MIB
MIN_TOTAL_VALUES: Final = 20_000_000
"""Values that a columnar file may have whatever its size, some ten seconds of reading; a row counts as ten more."""
MAX_VALUES_PER_BYTE: Final = 200
"""Values per byte of a larger file. Honest ones have less than one; a run of nulls takes a few bytes for any number."""
_VALUES_PER_ROW: Final = 10
_FOOTER_ITEMS: Final = 100_000
"""Row groups or columns in the footer of a Parquet file; each takes kilobytes of memory."""
_START_BYTES: Final = 64
_ARRAY_OF_OBJECTS: Final = re.compile(rb"\[\s*(\{|$)")
_APPLE_ARCHIVE: Final = "__MACOSX"
"""Folder with metadata of the files in an archive that macOS made."""
_DESCRIPTIONS: Final = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"})
"""Files that the datasets library writes beside the data."""
_SPACE: Final = re.compile(r"\s*")
_DECODER: Final = json.JSONDecoder()


class FileRow(NamedTuple):
    """One row of a file."""

    number: int
    """From 1: lines of .jsonl with blank ones, records of .csv and .tsv with the header, elements or rows otherwise."""
    content: Mapping[str, Any] | RowError


def read_rows(path: Path) -> Iterator[FileRow]:
    """Yield every row of a file, invalid ones as RowError; raise FileError where the file cannot be read further."""
    yield from _READERS[detect_file_type(path.name)](path)


def detect_file_type(name: str) -> str:
    """Return the type of a file by its extension: jsonl, json, csv, tsv, parquet or arrow."""
    plain = name.lower()
    for suffix in COMPRESSED_SUFFIXES:
        plain = plain.removesuffix(suffix)
    compressed = len(plain) < len(name)
    extension = plain.rpartition(".")[2] if "." in plain else ""
    file_type = _EXTENSIONS.get(extension)
    if file_type is None or (compressed and file_type in _COLUMNAR):
        raise FileError(f"'{name}' is not a supported file type; use {SUPPORTED_EXTENSIONS}")
    return file_type


def is_data_file(path: str) -> bool:
    """Return whether a file of a folder is data; unsupported types, and what is hidden or begins with `_`, are not.

    Nor is what the datasets library writes beside the data: its descriptions, and the results of earlier `map` calls.
    """
    *folders, name = path.split("/")
    if any(folder.startswith(".") or folder == _APPLE_ARCHIVE for folder in folders):
        return False  # such as .ipynb_checkpoints, which has copies of the files
    with contextlib.suppress(FileError):
        beside = name in _DESCRIPTIONS or (name.startswith("cache-") and name.endswith(".arrow"))
        return not beside and not name.startswith((".", "_")) and bool(detect_file_type(name))
    return False


def _read_jsonl(path: Path) -> Iterator[FileRow]:
    with open_bytes(path) as stream:
        lines = _lines(stream)
        first = next(lines, None)
        if first is None:
            return
        if not _ARRAY_OF_OBJECTS.match(first[1]):
            for number, content in chain([first], lines):
                yield FileRow(number, _try_parse(parse_line, content))
            return
    yield from _read_json(path)


def _lines(stream: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that are not blank, with their numbers."""
    for number in count(1):
        line = stream.readline(MAX_ROW_BYTES + 1)
        if not line:
            return
        if len(line) > MAX_ROW_BYTES:
            raise FileError(f"row {number} has more than {MAX_ROW_BYTES // MIB} MiB; write one JSON object per line")
        content = line.removeprefix(b"\xef\xbb\xbf").strip()
        if content:
            yield number, content


def parse_line(content: bytes) -> Mapping[str, Any]:
    """Parse a line as a JSON object, which a comma may follow as in an array, or raise RowError."""
    try:
        check_values(content)
        value = json.loads(content.removesuffix(b",").decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RowError(f"byte {error.start + 1} is not UTF-8; save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise RowError(f"broken JSON at column {error.colno}: {error.msg}") from error
    except RecursionError as error:
        raise RowError(_TOO_DEEP) from error
    except TooManyValuesError as error:
        raise RowError(f"{error}; write fewer") from error
    except ValueError as error:
        raise RowError(_TOO_MANY_DIGITS) from error
    return _as_object(value)


_TOO_DEEP: Final = f"the JSON is nested too deeply, more than {MAX_NESTING} levels; write a flat object"
_TOO_MANY_DIGITS: Final = (
    f"an integer has more than {sys.get_int_max_str_digits():,} digits, Python's limit; write it as a string"
)


def _as_object(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise RowError(f"is {kind_of(value)}, not an object; write {{…}}")
    if is_nested_deeper(value):
        raise RowError(_TOO_DEEP)
    return value


def _try_parse(parse: Callable[[Any], Mapping[str, Any]], value: Any) -> Mapping[str, Any] | RowError:
    try:
        return parse(value)
    except RowError as error:
        return error


@dataclass
class _Window:
    """Sliding window over a text stream; everything before `position` is consumed."""

    stream: TextIO
    text: str = ""
    position: int = 0

    def peek(self) -> str:
        """Return the next character that is not white space, or an empty string at the end."""
        while True:
            found = _SPACE.match(self.text, self.position)
            self.position = found.end() if found else self.position
            if self.position < len(self.text):
                return self.text[self.position]
            if not self._grow():
                return ""

    def take(self) -> Any:
        """Consume and return the next JSON value."""
        while True:
            try:
                value, self.position = _DECODER.raw_decode(self.text, self.position)
            except json.JSONDecodeError:
                # The value may continue beyond the window, so the error counts only at the end of the file.
                check_values(self.text, self.position)
                if len(self.text) - self.position > MAX_ROW_BYTES or not self._grow():
                    raise
            else:
                return value

    def _grow(self) -> bool:
        rest = self.text[self.position :]
        more = self.stream.read(max(_CHUNK_CHARACTERS, len(rest)))
        self.text, self.position = rest + more, 0
        return bool(more)


def _read_json(path: Path) -> Iterator[FileRow]:
    """Yield the elements of one array; after a broken one, the start of the next cannot be found."""
    if _has_lines_of_objects(path):
        yield from _read_jsonl(path)
        return
    with _open_text(path) as stream:
        window = _Window(stream)
        if not (first := window.peek()):
            return
        if first != "[":
            raise FileError("is not an array; write [{…}, {…}], or one object per line in a file named .jsonl")
        window.position += 1
        for number in count(1):
            if window.peek() == "]":
                break
            yield FileRow(number, _try_parse(_as_object, _element(window, number)))
            if (separator := window.peek()) not in {",", "]"}:
                found = f"{separator!r}" if separator else "the end of the file"
                raise FileError(f"row {number} is followed by {found}; write a comma, or ] after the last row")
            window.position += separator == ","
        window.position += 1
        if more := window.peek():
            raise FileError(f"its array is followed by {more!r}; write all rows in one array")


def _has_lines_of_objects(path: Path) -> bool:
    """Return whether a file named .json has JSON lines: two lines that are objects, or one and the start of another."""
    with open_bytes(path) as stream:
        start = cast("io.BufferedReader", stream).peek(_START_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip()
        if start and not start.startswith(b"{"):
            return False
        lines = _lines(stream)
        first = next(lines, None)
        if first is None or not first[1].startswith(b"{") or isinstance(_try_parse(parse_line, first[1]), RowError):
            return False
        second = next(lines, None)
        return second is not None and second[1].startswith(b"{")


def _element(window: _Window, number: int) -> Any:
    try:
        return window.take()
    except json.JSONDecodeError as error:
        raise FileError(f"row {number}: broken JSON: {error.msg}; the rows after it are not read") from error
    except RecursionError as error:
        raise FileError(f"row {number}: {_TOO_DEEP}") from error
    except TooManyValuesError as error:
        raise FileError(f"row {number} {error}; write fewer") from error
    except ValueError as error:
        raise FileError(f"row {number}: {_TOO_MANY_DIGITS}") from error


def _read_csv(path: Path, delimiter: str) -> Iterator[FileRow]:
    csv.field_size_limit(MAX_ROW_BYTES)
    with _open_text(path) as stream:
        lines = _RecordLines(stream, delimiter)
        records = csv.reader(lines, delimiter=delimiter, strict=True)
        number = 0
        try:
            header = next(records, None)
            if header is None:
                return
            header = [name.strip() for name in header]  # "instruction, output" has a blank in the second name
            # pandas writes its index into a first column without a name.
            _check_header(header[1:] if header[:1] == [""] else header)
            number = 1
            lines.start_record()
            for number, cells in enumerate(records, start=2):
                lines.start_record()
                if cells:
                    yield FileRow(number, _to_fields(header, cells))
        except csv.Error as error:
            raise FileError(f'row {number + 1}: {error}; quote cells with " and double the quotes in them') from error


@dataclass
class _RecordLines:
    """Lines of a CSV file, up to the maximum size of a record: a quote that is never closed takes all that follow."""

    stream: TextIO
    delimiter: str
    size: int = 0
    """Characters since the start of the record."""
    delimiters: int = 0
    """Of these; each ends a cell, and even an empty one takes memory."""

    def start_record(self) -> None:
        """Count from here on."""
        self.size = self.delimiters = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self.stream.readline(MAX_ROW_BYTES + 1)
        self.size += len(line)
        if self.size > MAX_ROW_BYTES:
            raise csv.Error(f"has more than {MAX_ROW_BYTES // MIB} MiB")
        self.delimiters += line.count(self.delimiter)
        if self.delimiters > MAX_VALUES:
            raise csv.Error(f"has more than {MAX_VALUES:,} cells")
        if not line:
            raise StopIteration
        return line


def _to_fields(header: Sequence[str], cells: Sequence[str]) -> Mapping[str, Any] | RowError:
    if len(cells) != len(header):
        return RowError(
            f"has {len(cells)} cells where the header has {len(header)}; quote cells that contain the separator"
        )
    return {name: cell for name, cell in zip(header, cells, strict=True) if name}


def _check_header(names: Sequence[str]) -> None:
    if len(names) > MAX_COLUMNS:
        raise FileError(f"has {len(names):,} columns, more than {MAX_COLUMNS:,}; keep those that the row format reads")
    duplicate = next((name for name, count in Counter(names).items() if count > 1), None)
    if duplicate is not None:
        raise FileError(f"has two columns '{duplicate}'; rename one")
    if not names:
        raise FileError("has no columns; write one for each field of the row format")
    if "" in names:
        raise FileError(f"column {names.index('') + 1} has no name; name it in the header")
    if len(names) == 1 and (separator := next((mark for mark in ";\t|" if mark in names[0]), None)):
        raise FileError(f"its header has one column '{names[0]}'; separate columns by commas, not by {separator!r}")


def _read_parquet(path: Path) -> Iterator[FileRow]:
    import pyarrow.parquet as pq  # noqa: PLC0415 (slow to import)

    _check_start(path, b"PAR1")
    with _reading_columns("Parquet", f"{_BATCH_ROWS} rows or fewer", "rows, pages and dictionaries"):
        with memory_limit(MAX_READ_BYTES):
            file = pq.ParquetFile(
                path, memory_map=True, thrift_container_size_limit=_FOOTER_ITEMS, page_checksum_verification=True
            )
        with file:
            _check_header(file.schema_arrow.names)
            groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
            rows = _rows_per_batch(sum(group.total_byte_size for group in groups), file.metadata.num_rows)
            yield from _numbered(file.iter_batches(batch_size=rows, use_threads=False), path.stat().st_size)


def _read_arrow(path: Path) -> Iterator[FileRow]:
    import pyarrow as pa  # noqa: PLC0415 (slow to import)

    _check_start(path, b"ARROW1")
    what = f"a record batch, or for {_BATCH_ROWS} of its rows"
    with _reading_columns("Arrow", what, "record batches, rows and dictionaries"):
        with memory_limit(MAX_READ_BYTES):
            source = pa.memory_map(str(path))
            batches = _open_ipc(source)
        with source, batches:
            _check_header(batches.schema.names)
            yield from _numbered(map(_validated, _record_batches(batches)), path.stat().st_size)


def _check_start(path: Path, own: bytes) -> None:
    check_content(read_start(path, _START_BYTES), own)


def _validated(batch: Any) -> Any:
    """Check that no offset of a batch points out of its buffers, which Arrow does not do when it reads them."""
    batch.validate(full=True)
    return batch


@contextlib.contextmanager
def _reading_columns(file_type: str, what: str, parts: str) -> Iterator[None]:
    """Turn errors of pyarrow into FileError; for one about memory, `what` is read at a time and has these parts."""
    import pyarrow as pa  # noqa: PLC0415 (slow to import)

    pa.allocate_buffer(1)  # the allocator reserves its arena now, so that it does not count as memory of the file
    try:
        yield
    except FileError:
        raise
    except MemoryError as error:
        raise FileError(
            f"needs more than {MAX_READ_BYTES // MIB:,} MiB of memory for {what}; write it again with smaller {parts}"
        ) from error
    # A value that Python cannot hold: a year beyond 9999, text that is not UTF-8, an object as the key of a map.
    except (pa.ArrowException, OSError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise FileError(f"is not a readable {file_type} file ({_first_line(error)}); write it again") from error


def _rows_per_batch(size: int, rows: int) -> int:
    """Return the rows to read at a time; size and number of rows are what the file says, and may be wrong."""
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES * max(rows, 1) // max(size, 1)))


def _open_ipc(source: Any) -> Any:
    """Open an Arrow file (with footer) or an Arrow stream, which is what the datasets library writes."""
    import pyarrow as pa  # noqa: PLC0415 (slow to import)

    try:
        return pa.ipc.open_file(source)
    except pa.ArrowInvalid:
        source.seek(0)
        return pa.ipc.open_stream(source)


def _record_batches(reader: Any) -> Iterator[Any]:
    if hasattr(reader, "num_record_batches"):
        return (reader.get_batch(number) for number in range(reader.num_record_batches))
    return iter(reader)


def _numbered(batches: Iterator[Any], size: int) -> Iterator[FileRow]:
    number = 0
    values_left = max(MIN_TOTAL_VALUES, MAX_VALUES_PER_BYTE * size)
    while (batch := _within_memory(lambda: next(batches, None))) is not None:
        values = _within_memory(partial(count_values, batch))
        values_left -= values + batch.num_rows * _VALUES_PER_ROW
        if values_left < 0:
            raise FileError(f"has more values than its {size:,} bytes can hold; write it again without repeated ones")
        step = _rows_per_batch(batch.nbytes, batch.num_rows)
        for start in range(0, batch.num_rows, step):
            part = batch.slice(start, step)
            if values > MAX_VALUES and _within_memory(partial(count_values, part)) > MAX_VALUES * part.num_rows:
                raise FileError(
                    f"row {number + 1}, or one soon after it, has more than {MAX_VALUES:,} values; write fewer"
                )
            for row in _within_memory(partial(part.to_pylist, maps_as_pydicts="strict")):
                number += 1
                yield FileRow(number, row)


def _within_memory(read: Callable[[], Any]) -> Any:
    with memory_limit(MAX_READ_BYTES):
        return read()


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


@contextlib.contextmanager
def _open_text(path: Path) -> Iterator[TextIO]:
    """Open as text; bytes that are not UTF-8 become lone surrogates, which `text_of` rejects."""
    with open_bytes(path) as stream:
        yield io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")


_READERS: Final[dict[str, Callable[[Path], Iterator[FileRow]]]] = {
    "jsonl": _read_jsonl,
    "json": _read_json,
    "csv": lambda path: _read_csv(path, ","),
    "tsv": lambda path: _read_csv(path, "\t"),
    "parquet": _read_parquet,
    "arrow": _read_arrow,
}
_EXTENSIONS: Final = {name: name for name in _READERS} | {"ndjson": "jsonl", "feather": "arrow", "pq": "parquet"}
_COLUMNAR: Final = ("parquet", "arrow")
SUPPORTED_EXTENSIONS: Final = ".jsonl, .json, .csv or .tsv (each also with .gz or .zst), .parquet or .arrow"
