"""Files that are small, and large once they are read: each ends in its reason, soon and in bounded memory."""

import gzip
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qlora_api.units import MIB
from qlora_api.untrusted_json import InvalidJsonError, parse_object
from qlora_api.v1alpha1 import DataSource
from qlora_cli.local.output_store import MAX_REPORT_BYTES
from qlora_trainer.data import compressed_files, file_readers, row_formats, rows, sources
from qlora_trainer.data.rows import Text, group_of
from qlora_trainer.data.sources import make_source
from qlora_trainer.errors import RunError
from qlora_trainer.storage import store
from qlora_trainer.storage.local_store import FileStore
from qlora_trainer.storage.store import DATASET_FIELD
from tests.unit.security.children import run_in_child

SCALED = {"MAX_READ_BYTES": 128 * MIB, "MAX_ROW_BYTES": 4 * MIB, "MIN_DECOMPRESSED_BYTES": 8 * MIB}
"""Bounds of the readers in these tests: an eighth or less, so that a bomb is quick to write and to read."""
MAX_PEAK_BYTES = 1280 * MIB
"""What one read may take here, the libraries, and an arena of 1 GiB that Arrow's allocator reserves."""


def read_dataset(path: Path) -> str:
    for name, value in SCALED.items():
        setattr(compressed_files if name == "MIN_DECOMPRESSED_BYTES" else file_readers, name, value)
    file_readers.MIN_TOTAL_VALUES = 5_000_000
    row_formats.MAX_TEXT_BYTES = rows.MAX_TEXT_BYTES = MIB
    source = make_source(DATASET_FIELD, (path,), DataSource(uri="s3://data/rows"), None)
    return str(sum(1 for located in source.rows() if located.row.digest))


def write_columns(path: Path, **columns: pa.Array) -> None:
    pq.write_table(pa.table(columns), path, compression="zstd")


def write_ipc(path: Path, compression: str | None = None, **columns: pa.Array) -> None:
    table, options = pa.table(columns), pa.ipc.IpcWriteOptions(compression=compression)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema, options=options) as file:
        file.write_table(table)


def write_gzip(path: Path, *parts: tuple[bytes, int]) -> None:
    """Write repeated contents without holding them in memory."""
    with gzip.open(path, "wb", compresslevel=9) as stream:
        for content, times in parts:
            for start in range(0, times, MIB):
                stream.write(content * min(MIB, times - start))


def one_value(size: int, times: int) -> pa.Array:
    """Return an array that stores one text and repeats it."""
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(times, np.int32)), pa.array(["x" * size]))


def dictionary_of_one_text(path: Path) -> None:
    write_columns(path, prompt=one_value(16 * MIB, 256), completion=pa.array(["b"] * 256))


def list_of_one_text(path: Path) -> None:
    texts = one_value(MIB, 1_000_000)
    write_columns(path, text=pa.ListArray.from_arrays(pa.array([0, len(texts)], pa.int32()), texts))


def compressed_pages(path: Path) -> None:
    text = pa.array(["x" * (80 * MIB)])
    table = pa.table({"prompt": text, "completion": text, "system": text})
    pq.write_table(table, path, compression="zstd", use_dictionary=False)


def many_columns(path: Path) -> None:
    write_columns(path, **{f"column{number}": pa.array(["a"]) for number in range(20_000)})


def year_beyond_python(path: Path) -> None:
    write_columns(path, text=pa.array(["a"]), at=pa.array([2**60], pa.timestamp("ms")))


def text_that_is_not_utf8(path: Path) -> None:
    raw = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(np.array([0, 2], np.int32)), pa.py_buffer(b"\xff\xfe")]
    )
    write_columns(path, text=raw)


def truncated_parquet(path: Path) -> None:
    dictionary_of_one_text(path)
    path.write_bytes(path.read_bytes()[:-400] + path.read_bytes()[-200:])


def offsets_out_of_the_buffer(path: Path) -> None:
    size = 0x1234
    write_ipc(path, text=pa.array(["x" * size]))
    valid, outside = (np.array([0, end], np.int32).tobytes() for end in (size, 1 << 28))
    path.write_bytes(path.read_bytes().replace(valid, outside))


def views_of_one_list(path: Path) -> None:
    texts, rows = pa.array(["x"] * 400_000), 256
    offsets, sizes = pa.array(np.zeros(rows, np.int32)), pa.array(np.full(rows, len(texts), np.int32))
    write_ipc(path, text=pa.ListViewArray.from_arrays(offsets, sizes, texts))


def compressed_batch(path: Path) -> None:
    text = pa.array(["x" * (80 * MIB)])
    write_ipc(path, "zstd", prompt=text, completion=text, system=text)


def batch_of_a_declared_size(path: Path) -> None:
    """Write a compressed batch whose first buffer claims to have 4 EiB once it is decompressed."""
    compressed_batch(path)
    content = path.read_bytes()
    start = content.index(b"\x28\xb5\x2f\xfd")  # of a zstd frame, which the size in 8 bytes precedes
    path.write_bytes(content[: start - 8] + (1 << 62).to_bytes(8, "little") + content[start:])


def categories_of_one_text(path: Path) -> None:
    write_ipc(path, prompt=one_value(16 * MIB, 10_000), completion=pa.array(["b"] * 10_000))


def no_columns(path: Path) -> None:
    batch = pa.RecordBatch.from_struct_array(pa.StructArray.from_arrays([], fields=[]))
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as file:
        file.write_batch(batch)


def list_of_nulls(path: Path) -> None:
    """Write 4 million nulls in a few hundred bytes."""
    nulls = pa.nulls(4_000_000, pa.int8())
    write_columns(path, text=pa.array(["a"]), x=pa.ListArray.from_arrays(pa.array([0, len(nulls)], pa.int32()), nulls))


def runs_of_a_list(path: Path) -> None:
    lists = pa.ListArray.from_arrays(pa.array([0, 4_000_000], pa.int32()), pa.nulls(4_000_000))
    write_ipc(path, text=pa.RunEndEncodedArray.from_arrays(pa.array([20], pa.int32()), lists))


def rows_of_nulls(path: Path) -> None:
    columns = {f"column{number}": pa.nulls(60_000, pa.string()) for number in range(100)}
    write_columns(path, text=one_value(1, 60_000), **columns)


def map_with_objects_as_keys(path: Path) -> None:
    kind = pa.map_(pa.struct([("a", pa.int8())]), pa.int8())
    write_columns(path, text=pa.array(["a"]), x=pa.array([[({"a": 1}, 1)]], kind))


def page_that_was_changed(path: Path) -> None:
    text = pa.array(["a word " * 20])
    pq.write_table(
        pa.table({"text": text}), path, compression="none", use_dictionary=False, write_page_checksum=True,
        write_statistics=False,
    )  # fmt: skip
    path.write_bytes(path.read_bytes().replace(b"a word ", b"1 word ", 1))


def csv_of_columns(path: Path) -> None:
    path.write_text(",".join(f"column{number}" for number in range(200_000)) + "\n")


def json_integer(path: Path) -> None:
    path.write_text('[{"text": "a", "id": ' + "9" * 5000 + "}]")


def jsonl_integer(path: Path) -> None:
    path.write_text('{"text": "a", "id": ' + "9" * 5000 + "}\n")


def nested(levels: int) -> str:
    return '{"messages": ' + "[" * levels + "]" * levels + "}"


def chat_row(**fields: object) -> str:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    return json.dumps({"messages": messages, **fields}) + "\n"


ROWS_CANNOT_BE_USED = "rows cannot be used as"
BOMBS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "parquet-dictionary": ("x.parquet", dictionary_of_one_text, "needs more than 128 MiB of memory"),
    "parquet-dictionary-in-list": ("x.parquet", list_of_one_text, "needs more than 128 MiB of memory"),
    "parquet-compressed-pages": (
        "x.parquet",
        compressed_pages,
        "spec.dataset.uri: x.parquet needs more than 128 MiB of memory for 256 rows or fewer; write it again with "
        "smaller rows, pages and dictionaries",
    ),
    "parquet-columns": ("x.parquet", many_columns, "has 20,000 columns, more than 10,000"),
    "parquet-year": ("x.parquet", year_beyond_python, "is not a readable Parquet file"),
    "parquet-not-utf8": ("x.parquet", text_that_is_not_utf8, "is not a readable Parquet file"),
    "parquet-truncated": ("x.parquet", truncated_parquet, "is not a readable Parquet file"),
    "parquet-nulls-in-list": ("x.parquet", list_of_nulls, "row 1, or one soon after it, has more than 3,000,000 v"),
    "parquet-rows-of-nulls": ("x.parquet", rows_of_nulls, "bytes can hold; write it again without repeated ones"),
    "parquet-keys": ("x.parquet", map_with_objects_as_keys, "is not a readable Parquet file (unhashable type"),
    "parquet-checksum": ("x.parquet", page_that_was_changed, "is not a readable Parquet file (could not verify"),
    "arrow-run-of-a-list": ("x.arrow", runs_of_a_list, "has more values than its"),
    "arrow-offsets": ("x.arrow", offsets_out_of_the_buffer, "is not a readable Arrow file"),
    "arrow-views": ("x.arrow", views_of_one_list, "needs more than 128 MiB of memory"),
    "arrow-compressed-batch": (
        "x.arrow",
        compressed_batch,
        "spec.dataset.uri: x.arrow needs more than 128 MiB of memory for a record batch, or for 256 of its rows; write "
        "it again with smaller record batches, rows and dictionaries",
    ),
    "arrow-declared-size": ("x.arrow", batch_of_a_declared_size, "x.arrow needs more than 128 MiB of memory for a"),
    "arrow-categories": ("x.arrow", categories_of_one_text, "needs more than 128 MiB of memory"),
    "arrow-no-columns": ("x.arrow", no_columns, "has no columns"),
    "csv-columns": ("x.csv", csv_of_columns, "has 200,000 columns, more than 10,000"),
    "csv-quote": ("x.csv.gz", lambda path: write_gzip(path, (b'text\n"', 1), (b"a\n", 4 * MIB)), "more than 4 MiB"),
    "csv-line": ("x.csv.gz", lambda path: write_gzip(path, (b"a", 6 * MIB)), "more than 4 MiB"),
    "csv-cells": ("x.csv.gz", lambda path: write_gzip(path, (b"text\n", 1), (b'"\n",', 4 * MIB)), "more than 4 MiB"),
    "csv-empty-lines": ("x.csv.gz", lambda path: write_gzip(path, (b"text\n", 1), (b"\n", 20 * MIB)), "expands"),
    "json-integer": ("x.json", json_integer, "row 1: an integer has more than 4,300 digits"),
    "json-spaces": ("x.json.gz", lambda path: write_gzip(path, (b"[", 1), (b" ", 20 * MIB)), "expands to more"),
    "json-deep": ("x.json", lambda path: path.write_text("[" + nested(500) + "]"), "row 1: the JSON is nested"),
    "jsonl-integer": ("x.jsonl", jsonl_integer, "row 1: an integer has more than 4,300 digits"),
    "jsonl-deep": ("x.jsonl", lambda path: path.write_text(nested(100_000)), "row 1: the JSON is nested too deeply"),
    "jsonl-deep-enough": ("x.jsonl", lambda path: path.write_text(nested(101)), "row 1: the JSON is nested too deeply"),
    "jsonl-line": ("x.jsonl.gz", lambda path: write_gzip(path, (b"[", 6 * MIB)), "row 1 has more than 4 MiB"),
    "jsonl-empty-lines": ("x.jsonl.gz", lambda path: write_gzip(path, (b"\n", 20 * MIB)), "expands to more"),
    "jsonl-text": (
        "x.jsonl",
        lambda path: path.write_text(json.dumps({"text": "x" * (2 * MIB)})),
        "row 1: has more than 1 MiB of text; split it",
    ),
    "jsonl-tools": (
        "x.jsonl",
        lambda path: path.write_text(chat_row(tools=[{"x": ["y"] * 300_000}])),
        "row 1: has more than 1 MiB of text; split it",
    ),
    "jsonl-half-character-in-tools": (
        "x.jsonl",
        lambda path: path.write_text(chat_row(tools=[{"name": "\ud800"}])),
        "contains bytes that are not UTF-8, or half a character",
    ),
    "jsonl-messages": (
        "x.jsonl",
        lambda path: path.write_text(json.dumps({"messages": [{"role": "user", "content": "a"}] * 72_000})),
        "field 'messages' has 72,000 messages, more than 2,000; split the row",
    ),
    "jsonl-infinity": ("x.jsonl", lambda path: path.write_text('{"text": 1e400}'), "field 'text' is a number (inf)"),
    "jsonl-half-character-in-name": (
        "x.jsonl",
        lambda path: path.write_text('{"\\ud800": 1}'),
        "has the fields \\ud800; write messages",
    ),
    "jsonl-long-name": (
        "x.jsonl",
        lambda path: path.write_text(json.dumps({"x" * MIB: 1})),
        "has the fields xxx",
    ),
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_bomb_in_a_dataset_ends_in_its_reason_with_bounded_memory(tmp_path, bomb):
    name, write, message = BOMBS[bomb]
    write(tmp_path / name)
    found = run_in_child(read_dataset, tmp_path / name)
    assert found.reason == "DatasetInvalid"
    assert message in found.message
    assert len(found.message) < 1000
    assert found.peak < MAX_PEAK_BYTES


EMPTY_VALUES: dict[str, tuple[str, tuple[bytes, bytes, bytes], str]] = {
    "jsonl-lists": ("x.jsonl", (b'{"text":[', b"[],", b"[]]}"), "row 1: has more than 3,000,000 values; write fewer"),
    "jsonl-objects": ("x.jsonl", (b'{"text":[', b"{},", b"{}]}"), "row 1: has more than 3,000,000 values; write fewer"),
    "json-lists": ("x.json", (b'[{"text":[', b"[],", b"[]]}]"), "row 1 has more than 3,000,000 values; write fewer"),
    "jsonl-lists-in-text": (
        "x.jsonl",
        (b'{"messages":[],"tools":"[', b"[],", b'[]]"}'),
        "row 1: has more than 3,000,000 values; write fewer",
    ),
    "csv-tools": ("x.csv", (b'messages,tools\n[],"[', b"[],", b'[]]"'), "row 2: has more than 3,000,000 cells"),
    "csv-header": ("x.csv", (b"a", b",", b"\n"), "row 1: has more than 3,000,000 cells"),
    "csv-record": ("x.csv", (b"text\n", b",", b"\n"), "row 2: has more than 3,000,000 cells"),
    "tsv-record": ("x.tsv", (b"text\n", b"\t", b"\n"), "row 2: has more than 3,000,000 cells"),
}
LARGEST_ROW = 60 * MIB


def read_largest_row(path: Path) -> str:
    """Read with the limits of a preparation."""
    for _ in make_source(DATASET_FIELD, (path,), DataSource(uri="s3://data/rows"), None).rows():
        pass
    return ""


@pytest.mark.parametrize("bomb", EMPTY_VALUES)
def test_row_of_empty_values_ends_in_its_reason_with_bounded_memory(tmp_path, bomb):
    name, (start, item, end), message = EMPTY_VALUES[bomb]
    (tmp_path / name).write_bytes(start + item * (LARGEST_ROW // len(item)) + end)
    found = run_in_child(read_largest_row, tmp_path / name)
    assert found.reason == "DatasetInvalid"
    assert message in found.message
    assert found.grown < 320 * MIB


def test_accents_in_a_row_are_grouped_in_linear_time():
    """Python sorts them by their class in quadratic time: hours for a row of 6 MB."""
    start = time.process_time()
    groups = {group_of(Text("a" + "\u0316\u0301" * 500_000)), group_of(Text("A " + "\u0316\u0301" * 500_000))}
    assert time.process_time() - start < 20
    assert len(groups) == 2
    assert group_of(Text("Cafe\u0301 au lait")) == group_of(Text("CAF\u00c9  au lait"))


@pytest.mark.parametrize("item", [b"[],", b"{},", b'"",'], ids=["lists", "objects", "texts"])
def test_report_of_the_largest_size_takes_bounded_memory(item):
    found = run_in_child(parse_largest_report, item)
    assert found.message == "has more than 3,000,000 values"
    assert found.grown < 320 * MIB


def parse_largest_report(item: bytes) -> str:
    try:
        parse_object(b'{"x":[' + item * (LARGEST_ROW // len(item)) + b"0]}", MAX_REPORT_BYTES)
    except InvalidJsonError as error:
        return str(error)
    return "parsed"


def test_rows_of_a_source_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_ROWS", 1000)
    runs = pa.RunEndEncodedArray.from_arrays(pa.array([1500], pa.int32()), pa.array(["a"]))
    write_ipc(tmp_path / "x.arrow", text=runs)
    source = make_source(DATASET_FIELD, (tmp_path / "x.arrow",), DataSource(uri="s3://data/rows"), None)
    with pytest.raises(RunError, match=r"x\.arrow brings the source to more than 1,000 rows; use several sources"):
        list(source.rows())


def test_files_of_a_folder_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "MAX_LISTED", 3)
    for number in range(4):
        (tmp_path / f"{number}.jsonl").touch()
    with pytest.raises(
        RunError, match=r"spec\.dataset\.uri: file:///.* holds more than 3 files; use a folder with fewer"
    ):
        FileStore(tmp_path.as_uri(), DATASET_FIELD).list()
