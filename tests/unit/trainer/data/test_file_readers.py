"""Files of every type: their rows, and the errors of invalid ones."""

import gzip
import json
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from qlora_trainer.data import compressed_files, file_readers
from qlora_trainer.data.file_readers import FileError, FileRow, detect_file_type, is_data_file, read_rows
from qlora_trainer.data.rows import RowError

ROWS = [{"prompt": "1+1=", "completion": "2"}, {"prompt": 'say "a,\nb"', "completion": "ünïcode 🦙"}]
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:12ab\nsize 12345\n"
CSV = 'prompt,completion\n1+1=,2\n"say ""a,\nb""",ünïcode 🦙\n'


def zstd(text: str) -> bytes:
    compressed: bytes = pa.compress(text.encode(), codec="zstd", asbytes=True)
    return compressed


def write_parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), path)


def write_stream(path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_stream(path, table.schema) as stream:
        stream.write_table(table)


WRITERS = {
    "rows.jsonl": lambda path: path.write_text("".join(f"{json.dumps(row)}\n" for row in ROWS)),
    "rows.ndjson": lambda path: path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)),
    "rows.json": lambda path: path.write_text(json.dumps(ROWS, indent=2)),
    "rows.csv": lambda path: path.write_text(CSV),
    "rows.tsv": lambda path: path.write_text(
        CSV.replace("prompt,", "prompt\t").replace("=,", "=\t").replace('",', '"\t')
    ),
    "marked.csv": lambda path: path.write_text(CSV, encoding="utf-8-sig"),
    "windows.csv": lambda path: path.write_bytes(CSV.replace("2\n", "2\r\n").encode()),
    "rows.jsonl.gz": lambda path: path.write_bytes(gzip.compress("\n".join(map(json.dumps, ROWS)).encode())),
    "rows.json.gz": lambda path: path.write_bytes(gzip.compress(json.dumps(ROWS).encode())),
    "rows.csv.gz": lambda path: path.write_bytes(gzip.compress(CSV.encode())),
    "rows.jsonl.zst": lambda path: path.write_bytes(zstd("\n".join(map(json.dumps, ROWS)))),
    "rows.csv.zst": lambda path: path.write_bytes(zstd(CSV)),
    "lines.json": lambda path: path.write_text("".join(f"{json.dumps(row)}\n" for row in ROWS)),
    "commas.jsonl": lambda path: path.write_text("".join(f"{json.dumps(row)},\n" for row in ROWS)),
    "commas.json": lambda path: path.write_text("".join(f"{json.dumps(row)},\n" for row in ROWS)),
    "array.jsonl": lambda path: path.write_text("[\n" + ",\n".join(map(json.dumps, ROWS)) + "\n]\n"),
    "gzip.jsonl": lambda path: path.write_bytes(gzip.compress("\n".join(map(json.dumps, ROWS)).encode())),
    "gzip.csv": lambda path: path.write_bytes(gzip.compress(CSV.encode())),
    "zstd.json": lambda path: path.write_bytes(zstd(json.dumps(ROWS))),
    "index.csv": lambda path: path.write_text(',prompt,completion\n0,1+1=,2\n1,"say ""a,\nb""",ünïcode 🦙\n'),
    "rows.parquet": write_parquet,
    "rows.feather": lambda path: pyarrow.feather.write_feather(pa.Table.from_pylist(ROWS), str(path)),
    "rows.arrow": write_stream,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_file_type_gives_the_same_rows(tmp_path, name):
    WRITERS[name](tmp_path / name)
    assert [row.content for row in read_rows(tmp_path / name)] == ROWS


def read(tmp_path: Path, name: str, content: str | bytes) -> list[FileRow]:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return list(read_rows(path))


@pytest.mark.parametrize(
    ("name", "content", "number", "message"),
    [
        pytest.param("x.jsonl", "{}\n\n{oops\n", 3, "broken JSON at column 2", id="jsonl"),
        pytest.param("x.jsonl", "{}\n[1]\n", 2, "is a list, not an object", id="jsonl-list"),
        pytest.param("x.jsonl", "null", 1, "is null, not an object", id="jsonl-null"),
        pytest.param("x.jsonl", b'{"a": "\xff"}', 1, "byte 8 is not UTF-8", id="jsonl-encoding"),
        pytest.param("x.jsonl", '{"a":' * 100_000, 1, "nested too deeply", id="jsonl-deep"),
        pytest.param("x.json", '[{}, "text"]', 2, "is text, not an object", id="json-text"),
        pytest.param("x.csv", "a,b\n1,2\n\n1,2,3\n", 4, "has 3 cells where the header has 2", id="csv-cells"),
    ],
)
def test_invalid_row_is_numbered_and_later_rows_are_read(tmp_path, name, content, number, message):
    invalid = {row.number: row.content for row in read(tmp_path, name, content) if isinstance(row.content, RowError)}
    assert list(invalid) == [number]
    assert message in str(invalid[number])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        pytest.param("x.json", '{"rows": []}', "is not an array; write", id="json-object"),
        pytest.param("x.json", '[{"a": 1}, {"a" 1}]', "row 2: broken JSON", id="json-broken"),
        pytest.param("x.json", '[{"a": 1} {"a": 2}]', "row 1 is followed by '{'; write a comma", id="json-comma"),
        pytest.param("x.json", '[{"a": 1}', "row 1 is followed by the end of the file", id="json-cut"),
        pytest.param("x.json", '[{"a":' * 100_000, "row 1: the JSON is nested too deeply", id="json-deep"),
        pytest.param("x.csv", "a,b,a\n1,2,3\n", "has two columns 'a'; rename one", id="csv-twice"),
        pytest.param("x.csv", "a,,b\n1,2,3\n", "column 2 has no name", id="csv-nameless"),
        pytest.param("x.csv", "prompt;completion\n1;2\n", "separate columns by commas, not by ';'", id="csv-semicolon"),
        pytest.param("x.csv", 'a,b\n1,"2"3\n', "row 2: ", id="csv-quote"),
        pytest.param("x.csv", "a,b\n1,2\n".encode("utf-16"), "is UTF-16; save it as UTF-8", id="utf-16"),
        pytest.param("x.jsonl.gz", "{}\n", "is an incomplete or invalid gzip file", id="no-gzip"),
        pytest.param("x.jsonl.gz", gzip.compress(b"{}\n" * 9)[:-9], "is an incomplete", id="cut-gzip"),
        pytest.param("x.parquet", "{}\n", "is not a readable Parquet file", id="no-parquet"),
        pytest.param("x.arrow", "{}\n", "is not a readable Arrow file", id="no-arrow"),
        pytest.param("x.jsonl.zst", "{}\n", "is an incomplete or invalid zstd file", id="no-zstd"),
        pytest.param("x.jsonl.zst", zstd("{}\n" * 99)[:-9], "is an incomplete or invalid zstd file", id="cut-zstd"),
        pytest.param(
            "x.json", '[{"a": 1}]\n[{"a": 2}]', "its array is followed by '['; write all rows in", id="arrays"
        ),
        pytest.param("x.json", '{"a": 1}\n', "is not an array", id="json-one-object"),
        pytest.param("x.jsonl", LFS, "is a pointer of git-lfs, and not the file; run 'git lfs pull'", id="lfs"),
        pytest.param(
            "x.parquet", LFS, "is a pointer of git-lfs, and not the file; run 'git lfs pull'", id="lfs-parquet"
        ),
        pytest.param("x.jsonl", b"PAR1\x15\x04", "is a Parquet file; name it .parquet", id="named-wrongly"),
        pytest.param("x.csv", b"PK\x03\x04\x14", "is a zip archive or an Excel file", id="excel"),
        pytest.param("x.json", "<!DOCTYPE html><p>Log in</p>", "is an HTML page, such as that of a login", id="html"),
        pytest.param("x.jsonl", b"BZh91AY", "is compressed by bzip2; compress it by gzip or zstd", id="bzip2"),
        pytest.param("x.txt", "{}\n", "'x.txt' is not a supported file type; use .jsonl, .json", id="unknown"),
    ],
)
def test_unreadable_file_is_refused_with_cause_and_fix(tmp_path, name, content, message):
    with pytest.raises(FileError) as caught:
        read(tmp_path, name, content)
    assert message in str(caught.value)


def test_overlong_line_is_not_read_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(file_readers, "MAX_ROW_BYTES", 1 << 20)
    with pytest.raises(FileError, match="row 1 has more than 1 MiB"):
        read(tmp_path, "x.jsonl", "[" + " " * (2 << 20))


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv", "x.jsonl.gz"])
def test_empty_file_has_no_rows(tmp_path, name):
    assert read(tmp_path, name, gzip.compress(b"\n") if name.endswith("gz") else "\n" * (name != "x.csv")) == []


@pytest.mark.parametrize(
    ("name", "file_type"),
    [("a.JSONL", "jsonl"), ("a.ndjson", "jsonl"), ("a.b.csv.gz", "csv"), ("a.pq", "parquet"), ("a.feather", "arrow")],
)
def test_file_type_follows_from_the_extension(name, file_type):
    assert detect_file_type(name) == file_type


@pytest.mark.parametrize("name", ["a", "jsonl", "a.txt", "a.parquet.gz", "a.gz", ""])
def test_unknown_extension_is_refused(name):
    with pytest.raises(FileError):
        detect_file_type(name)


def test_hidden_and_non_data_files_are_skipped():
    names = ["part/0.jsonl", ".0.jsonl.part", "_SUCCESS", "README.md", "part/.hidden.csv", "_metadata.parquet"]
    assert [name for name in names if is_data_file(name)] == ["part/0.jsonl"]


@pytest.mark.parametrize("name", ["many.jsonl", "many.json", "many.csv", "many.parquet"])
def test_memory_does_not_grow_with_the_rows(tmp_path, name):
    row = {"prompt": "p" * 400, "completion": "c"}
    path = tmp_path / name
    {
        ".jsonl": lambda: path.write_text(f"{json.dumps(row)}\n" * 10_000),
        ".json": lambda: path.write_text(f"[{','.join([json.dumps(row)] * 10_000)}]"),
        ".csv": lambda: path.write_text("prompt,completion\n" + f"{row['prompt']},c\n" * 10_000),
        ".parquet": lambda: pq.write_table(pa.Table.from_pylist([row] * 10_000), path, row_group_size=1000),
    }[path.suffix]()
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_rows(path)) == 10_000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3 << 20, "the file's rows have 4 MB"


def test_maps_of_parquet_are_objects(tmp_path):
    maps = pa.array([[("city", "Rome")], None], pa.map_(pa.string(), pa.string()))
    pq.write_table(pa.table({"arguments": maps}), tmp_path / "x.parquet")
    assert [row.content for row in read_rows(tmp_path / "x.parquet")] == [
        {"arguments": {"city": "Rome"}},
        {"arguments": None},
    ]


def test_zstd_file_that_expands_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(compressed_files, "MIN_DECOMPRESSED_BYTES", 1 << 20)
    with pytest.raises(FileError, match="expands to more than 200 times its size"):
        read(tmp_path, "x.jsonl.zst", zstd("{}\n" * (1 << 20)))
