"""Sources: format detection, invalid rows, and the files that a URI selects."""

import json
from pathlib import Path

import boto3
import pytest
from moto import mock_aws

from qlora_api.reasons import Reason
from qlora_api.runconfig import Platform
from qlora_api.v1alpha1 import DataSource
from qlora_trainer.data.rows import Example
from qlora_trainer.data.sources import local_files, make_source
from qlora_trainer.errors import RunError
from qlora_trainer.storage.credentials import environment_secrets
from qlora_trainer.storage.snapshots import SourceResolver
from qlora_trainer.storage.store import DATASET_FIELD

GOOD = '{"instruction": "Say hi", "output": "hi"}'
RESOLVER = SourceResolver(Platform(), environment_secrets())


def load(path: Path, content: str, **settings):
    path.write_text(content)
    source = make_source(DATASET_FIELD, (path,), DataSource(uri=f"file://{path}", **settings), None)
    return source, [located.row for located in source.rows()]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(GOOD + "\n\n\n[1]\n", "1 of 2 rows cannot be used as instruction rows. row 4: is", id="one"),
        pytest.param(GOOD + '\n{"instruction": "x"}', "row 2: field 'response' (or 'output') is missing", id="missing"),
        pytest.param('{"x": "y"}', "row 1 has the fields x; write messages", id="unknown-format"),
        pytest.param('{"prompt": "x"}', "row 1: field 'completion' is missing", id="completion"),
        pytest.param("{oops\n" * 9, "9 of 9 rows cannot be used", id="all-invalid"),
    ],
)
def test_invalid_row_is_reported_with_its_number(tmp_path, content, message):
    with pytest.raises(RunError, match=r"spec\.dataset\.uri") as caught:
        load(tmp_path / "rows.jsonl", content)
    assert caught.value.reason == Reason.DATASET_INVALID
    assert message in caught.value.message


def test_many_invalid_rows_are_counted_and_first_ones_listed(tmp_path):
    with pytest.raises(RunError) as caught:
        load(tmp_path / "rows.jsonl", "\n".join([GOOD] + ["{}"] * 100))
    assert "100 of 101 rows" in caught.value.message
    assert caught.value.message.endswith("row 6: field 'instruction' is missing; add it; and 95 more")


@pytest.mark.parametrize("content", ["", "\n\n", "\ufeff\n"])
def test_source_without_rows_is_refused(tmp_path, content):
    with pytest.raises(RunError) as caught:
        load(tmp_path / "rows.jsonl", content)
    assert caught.value.reason == Reason.DATASET_EMPTY


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(RunError) as caught:
        make_source(DATASET_FIELD, (tmp_path / "absent.jsonl",), DataSource(uri="file:///absent"), None)
    assert caught.value.reason == Reason.DATASET_NOT_FOUND


def test_format_is_detected_and_logged_and_max_samples_stops_reading(tmp_path):
    row = json.dumps({"prompt": "a", "completion": "b"})
    source, rows = load(tmp_path / "rows.jsonl", f"{row}\n{row}\n{{broken", max_samples=2)
    assert rows == [Example("a", "b")] * 2
    assert (source.row_format, source.format_reason) == ("completion", "detected by the field 'prompt' of row 1")


def test_explicit_format_is_used(tmp_path):
    source, rows = load(tmp_path / "rows.csv", "prompt,completion,text\na,b,c\n", format="text")
    assert (source.format_reason, rows[0].text) == ("set in the manifest", "c")


def test_uri_with_trailing_slash_reads_every_data_file_in_order(tmp_path):
    for name in ("b.jsonl", "a/c.csv", "a/b.jsonl", "README.md", "_SUCCESS"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(GOOD)
    files = local_files(RESOLVER, f"file://{tmp_path}/", DATASET_FIELD, tmp_path)
    assert [str(file.relative_to(tmp_path)) for file in files] == ["a/b.jsonl", "a/c.csv", "b.jsonl"]


def test_invalid_row_in_one_of_several_files_names_the_file(tmp_path):
    (tmp_path / "one.jsonl").write_text(GOOD)
    (tmp_path / "two.jsonl").write_text(f"{GOOD}\n{{}}")
    source = make_source(
        DATASET_FIELD, (tmp_path / "one.jsonl", tmp_path / "two.jsonl"), DataSource(uri="file:///x/"), None
    )
    with pytest.raises(RunError, match=r"two\.jsonl row 2: field 'instruction' is missing"):
        list(source.rows())


@pytest.mark.parametrize(
    ("uri", "reason", "message"),
    [
        ("file:///data/rows.txt", Reason.DATASET_INVALID, "use .jsonl, .json, .csv or .tsv (each also with .gz)"),
        ("file:///data/rows", Reason.DATASET_INVALID, "or end the URI with '/' to read every file below it"),
        ("hf://datasets/org/name", Reason.DATASET_NOT_FOUND, "write hf://datasets/organization/name/file.jsonl"),
    ],
)
def test_uri_without_file_is_refused(tmp_path, uri, reason, message):
    with pytest.raises(RunError) as caught:
        local_files(RESOLVER, uri, DATASET_FIELD, tmp_path)
    assert (caught.value.reason, message in caught.value.message) == (reason, True), caught.value.message


def test_folder_without_data_files_is_refused(tmp_path):
    (tmp_path / "README.md").write_text("nothing")
    with pytest.raises(RunError, match="has no file of type") as caught:
        local_files(RESOLVER, f"file://{tmp_path}/", DATASET_FIELD, tmp_path)
    assert caught.value.reason == Reason.DATASET_NOT_FOUND


def test_s3_prefix_downloads_every_data_file_below_it(tmp_path, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    with mock_aws():
        client = boto3.client("s3", region_name="us-east-1")
        client.create_bucket(Bucket="rows")
        for key in ("chats/b.jsonl", "chats/a.csv", "chats/_SUCCESS", "chats/", "other/c.jsonl"):
            client.put_object(Bucket="rows", Key=key, Body=GOOD.encode())
        files = local_files(RESOLVER, "s3://rows/chats/", DATASET_FIELD, tmp_path)
        (one,) = local_files(RESOLVER, "s3://rows/other/c.jsonl", DATASET_FIELD, tmp_path)
    assert [file.name for file in files] == ["a.csv", "b.jsonl"]
    assert one.read_text() == files[1].read_text() == GOOD
