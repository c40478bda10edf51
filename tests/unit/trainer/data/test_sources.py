"""Sources: format detection, invalid rows, and the files that a URI selects."""

import json
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import boto3
import pytest
from moto import mock_aws

from qlora_api.reasons import Reason
from qlora_api.runconfig import Platform
from qlora_api.v1alpha1 import DataSource
from qlora_trainer.data.dataset import Dataset, describe_invalid, describe_sources
from qlora_trainer.data.rows import Example
from qlora_trainer.data.sources import RowErrors, local_files, make_source
from qlora_trainer.errors import RunError
from qlora_trainer.storage.credentials import environment_secrets
from qlora_trainer.storage.snapshots import SourceResolver
from qlora_trainer.storage.store import DATASET_FIELD, EVALUATION_FIELD

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
    files = local_files(RESOLVER, f"file://{tmp_path}/", DATASET_FIELD, tmp_path).paths
    assert [str(file.relative_to(tmp_path)) for file in files] == ["a/b.jsonl", "a/c.csv", "b.jsonl"]


def write_files(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(GOOD)


@pytest.mark.parametrize(
    ("names", "field", "read", "left_out"),
    [
        pytest.param(
            ["test-00000-of-00001.jsonl", "train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "valid.jsonl"],
            DATASET_FIELD,
            ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"],
            ("test-00000-of-00001.jsonl", "valid.jsonl"),
            id="train",
        ),
        pytest.param(
            ["train.jsonl", "test.jsonl", "dev.jsonl"], EVALUATION_FIELD, ["dev.jsonl"], ("test.jsonl", "train.jsonl"),
            id="evaluation",
        ),
        pytest.param(["train.jsonl", "test.jsonl"], EVALUATION_FIELD, ["test.jsonl"], ("train.jsonl",), id="test"),
        pytest.param(
            ["train/a.jsonl", "test/a.jsonl", "extra.jsonl"], DATASET_FIELD, ["extra.jsonl", "a.jsonl"],
            ("test/a.jsonl",), id="folders",
        ),
        pytest.param(["test.jsonl", "val.jsonl"], DATASET_FIELD, ["test.jsonl", "val.jsonl"], (), id="no-train"),
        pytest.param(
            ["latest.jsonl", "trainers.jsonl", "contest.jsonl"], DATASET_FIELD,
            ["contest.jsonl", "latest.jsonl", "trainers.jsonl"], (), id="other-words",
        ),
    ],
)  # fmt: skip
def test_folder_is_read_without_the_files_of_other_splits(tmp_path, names, field, read, left_out):
    write_files(tmp_path / "data", *names)
    files = local_files(RESOLVER, f"file://{tmp_path}/data/", field, tmp_path)
    assert ([path.name for path in files.paths], files.left_out) == (read, left_out)


@pytest.mark.parametrize(
    ("pattern", "read"),
    [
        ("part-*.jsonl", ["part-0.jsonl", "part-1.jsonl"]),
        ("part-[1].jsonl", ["part-1.jsonl"]),
        ("part-?.jsonl", ["part-0.jsonl", "part-1.jsonl"]),
        ("*/test-*.jsonl", ["en/test-0.jsonl"]),
        ("**/*-0.jsonl", ["en/test-0.jsonl", "en/train-0.jsonl", "part-0.jsonl"]),
        ("*", ["part-0.jsonl", "part-1.jsonl", "what[0].jsonl"]),
        ("what[0].jsonl", ["what[0].jsonl"]),
    ],
)
def test_pattern_names_the_files_that_match(tmp_path, pattern, read):
    write_files(tmp_path / "d", "part-0.jsonl", "part-1.jsonl", "en/test-0.jsonl", "en/train-0.jsonl", "what[0].jsonl")
    (tmp_path / "d/README.md").write_text("no rows")
    for uri in (f"file://{tmp_path}/d/{pattern}", f"file://{tmp_path}/d/{quote(pattern)}"):
        files = local_files(RESOLVER, uri, DATASET_FIELD, tmp_path)
        assert [str(path.relative_to(tmp_path / "d")) for path in files.paths] == read


def test_pattern_that_matches_nothing_is_refused(tmp_path):
    with pytest.raises(RunError, match=r"no data file matches .*x\*\.jsonl; correct the URI") as caught:
        local_files(RESOLVER, f"file://{tmp_path}/x*.jsonl", DATASET_FIELD, tmp_path)
    assert caught.value.reason == Reason.DATASET_NOT_FOUND


@pytest.mark.parametrize("name", ["my data.jsonl", "50%.jsonl", "a#1?/b c#2.jsonl", "ünï+co%20de.jsonl"])
def test_odd_file_names_are_read(tmp_path, name):
    write_files(tmp_path, name)
    (path,) = local_files(RESOLVER, (tmp_path / name).as_uri(), DATASET_FIELD, tmp_path).paths
    assert path == tmp_path / name
    if "%20" not in name:
        assert local_files(RESOLVER, f"file://{tmp_path}/{name}", DATASET_FIELD, tmp_path).paths[0] == tmp_path / name


def test_files_that_the_datasets_library_writes_beside_the_data_are_no_data(tmp_path):
    write_files(tmp_path, "d/data-00000-of-00001.arrow", "d/cache-12ab.arrow", "d/state.json", "d/dataset_info.json")
    files = local_files(RESOLVER, f"file://{tmp_path}/d/", DATASET_FIELD, tmp_path)
    assert [path.name for path in files.paths] == ["data-00000-of-00001.arrow"]


def test_left_out_splits_are_logged(tmp_path):
    write_files(tmp_path / "d", "train.jsonl", "test.jsonl")
    files = local_files(RESOLVER, f"file://{tmp_path}/d/", DATASET_FIELD, tmp_path)
    source = make_source(DATASET_FIELD, files.paths, DataSource(uri="file:///d/"), None, files.left_out)
    (_, sentence) = describe_sources(Dataset((source,), None))
    assert sentence == (
        "spec.dataset.uri: 1 files are of another split, and are not read: test.jsonl; name them in the URI to use them"
    )


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
        (
            "file:///data/rows.txt",
            Reason.DATASET_INVALID,
            "use .jsonl, .json, .csv or .tsv (each also with .gz or .zst)",
        ),
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
        files = local_files(RESOLVER, "s3://rows/chats/", DATASET_FIELD, tmp_path).paths
        (one,) = local_files(RESOLVER, "s3://rows/other/c.jsonl", DATASET_FIELD, tmp_path).paths
        some = local_files(RESOLVER, "s3://rows/chats/?.j*l", DATASET_FIELD, tmp_path).paths
    assert [file.name for file in files] == ["a.csv", "b.jsonl"]
    assert [file.name for file in some] == ["b.jsonl"]
    assert one.read_text() == files[1].read_text() == GOOD


def test_invalid_rows_are_left_out_on_request_and_listed(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([GOOD] * 9 + ['{"instruction": "c", "output": ""}', "{oops"] + [GOOD] * 9))
    source = make_source(DATASET_FIELD, (path,), DataSource(uri="file:///x"), None)
    invalid = RowErrors()
    dropping = replace(source, drops_invalid=True)
    assert len(list(dropping.rows(invalid))) == 18
    assert (invalid.total, [location for location, _ in invalid.first]) == (2, ["row 10", "row 11"])
    assert list(describe_invalid(invalid))[1] == "left out, row 10: field 'output' is empty; fill it, or remove the row"
    with pytest.raises(RunError, match=r"2 of 20 rows cannot be used as instruction rows\. row 10"):
        list(source.rows())


def test_more_than_one_invalid_row_in_ten_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([GOOD] * 50 + ["{}"] * 6))
    source = make_source(DATASET_FIELD, (path,), DataSource(uri="file:///x"), None)
    with pytest.raises(
        RunError, match="6 of 56 rows cannot be used as instruction rows, more than 10%, which onInvalid"
    ):
        list(replace(source, drops_invalid=True).rows())
