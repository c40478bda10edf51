"""Files of others that are no files, or large once they are parsed: no reader stops, or fills the memory."""

import errno
import json
import os
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from qlora_api.foreign_files import FileTooLargeError, open_regular, read_file
from qlora_api.logs.redaction import REDACTOR
from qlora_api.object_names import ObjectName
from qlora_api.prepared import PinnedTasks, Prepared, PreparedInputs
from qlora_api.report import (
    MAX_MANIFEST_BYTES,
    AdapterRecord,
    EvaluatedRow,
    ManifestFile,
    MergedManifest,
    ResultManifest,
    RunReport,
    TerminationMessage,
)
from qlora_api.result import Result
from qlora_api.runconfig import PrepareConfig, RunConfig
from qlora_api.tolerant_reader import ignore_unknown
from qlora_api.units import GIB, MIB
from qlora_api.v1alpha1 import ModelSpec
from qlora_cli.commands.report import Report, read_report_json
from qlora_cli.local import data_preview
from qlora_cli.local.data_preview import PreviewError, preview_data
from qlora_cli.local.output_store import OutputError
from qlora_cli.manifests import loader, yaml_documents
from qlora_cli.manifests.loader import ManifestError, parse_manifest
from qlora_cli.manifests.model_config import NoConfigError, load_config
from qlora_cli.manifests.yaml_documents import YamlError, parse_documents
from qlora_cli.podlogs import archived
from qlora_cli.podlogs.archived import MissingLogs, merge_lines, parse_log, read_archived_logs
from qlora_trainer.errors import RunError
from qlora_trainer.inference.published_adapter import open_adapter
from qlora_trainer.storage import prepared_inputs
from qlora_trainer.storage.credentials import environment_secrets
from qlora_trainer.storage.local_store import FileStore
from qlora_trainer.storage.prepared_inputs import find_inputs
from qlora_trainer.storage.results import MANIFEST, find_manifest, manifest_json
from qlora_trainer.storage.snapshots import SourceResolver
from qlora_trainer.storage.store import DATASET_FIELD, OUTPUT_FIELD, MissingObjectError
from tests.make import DIGEST, NOW, UID, make_prepared, make_result
from tests.unit.cli.make import JOB
from tests.unit.cli.podlogs.test_archived import make_ended, make_left
from tests.unit.security.children import run_in_child

pytestmark = pytest.mark.timeout(120)  # a reader that waits for a pipe, or in quadratic time, fails and does not stop


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def link_to_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


SPECIAL = {"pipe": make_pipe, "device": link_to_device}
READERS: dict[str, Callable[[FileStore, Path], object]] = {
    "read": lambda store, _: store.read("x.json", 10),
    "start": lambda store, _: store.read_start("x.json", 10),
    "download": lambda store, work: store.download("x.json", work / "x.json"),
    "digest": lambda store, _: store.sha256("x.json"),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize("make", SPECIAL.values(), ids=SPECIAL)
def test_pipe_or_device_in_a_folder_is_no_file(
    tmp_path: Path, make: Callable[[Path], None], read: Callable[[FileStore, Path], object]
) -> None:
    (tmp_path / "rows").mkdir()
    make(tmp_path / "rows" / "x.json")
    with pytest.raises(MissingObjectError, match=r"spec\.dataset\.uri: there is no .*x\.json; correct the URI"):
        read(FileStore(f"file://{tmp_path}/rows", DATASET_FIELD), tmp_path)


@pytest.mark.parametrize("make", SPECIAL.values(), ids=SPECIAL)
def test_pipe_or_device_as_configuration_of_a_model_is_refused(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "config.json")
    with pytest.raises(NoConfigError, match=r"config\.json: not a regular file"):
        load_config(ModelSpec(uri=tmp_path.as_uri()), None, None)


def test_configuration_that_a_person_names_may_be_a_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "config"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=('{"model_type": "llama"}',))
    writer.start()
    assert load_config(ModelSpec(uri="hf://a/b"), str(pipe), None) == {"model_type": "llama"}
    writer.join()


def test_file_is_read_up_to_its_bound(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"123")
    assert read_file(tmp_path / "x", 3) == b"123"
    with pytest.raises(FileTooLargeError, match="has more than 2 bytes"):
        read_file(tmp_path / "x", 2)
    with pytest.raises(IsADirectoryError):
        open_regular(tmp_path)
    with pytest.raises(OSError, match="not a regular file") as caught:
        open_regular(Path("/dev/null"))
    assert caught.value.errno == errno.EINVAL


DIGEST64 = "c" * 64
MODELS: tuple[type[BaseModel], ...] = (
    AdapterRecord, EvaluatedRow, MergedManifest, PinnedTasks, PrepareConfig, Prepared, PreparedInputs, Result,
    ResultManifest, RunConfig, RunReport, TerminationMessage,
)  # fmt: skip
ITEMS = 20_000
SHAPES: dict[str, Any] = {
    "list-of-objects": [{}] * ITEMS,
    "list-of-lists": [[]] * ITEMS,
    "object-of-objects": {f"k{number}": {} for number in range(ITEMS)},
    "object-of-lists": {f"k{number}": [[]] for number in range(ITEMS)},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("model", MODELS)
def test_invalid_document_has_few_errors_however_many_items_it_has(model: type[BaseModel], shape: Any) -> None:
    document = {field.alias or name: shape for name, field in model.model_fields.items()}
    with pytest.raises(ValidationError) as caught:
        ignore_unknown(model, json.dumps(document), "test")
    assert caught.value.error_count() < 200
    assert len(str(caught.value)) < 200_000


def full(item: bytes, start: bytes = b'{"x":[', end: bytes = b"null]}") -> bytes:
    """Return a document of the largest size that is read."""
    return start + item * ((MAX_MANIFEST_BYTES - len(start) - len(end)) // len(item)) + end


BOMBS = {
    "lists": full(b"[],"),
    "objects": full(b"{},"),
    "lists-of-one": full(b"[1],"),
    "files": full(b"{},", b'{"files":['),
    "unknown-fields": full(b'"a%d":1,', b"{", b'"b":1}'),
    "nesting": b"[" * MAX_MANIFEST_BYTES,
}


def parse_bomb(name: str) -> str:
    content = BOMBS[name]
    if b"%d" in content:
        content = b"{%s}" % b",".join(b'"a%d":1' % number for number in range(MAX_MANIFEST_BYTES // 12))
    try:
        ignore_unknown(ResultManifest, content, "test")
    except ValidationError as error:
        return f"{error.error_count()} errors"
    return "valid"


@pytest.mark.parametrize("bomb", BOMBS)
def test_manifest_of_the_largest_size_takes_bounded_memory(bomb: str) -> None:
    assert len(BOMBS[bomb]) <= MAX_MANIFEST_BYTES
    found = run_in_child(parse_bomb, bomb)
    assert found.message.endswith(" errors"), found
    assert found.grown < 320 * MIB


def make_manifest(files: int) -> ResultManifest:
    return ResultManifest(
        digest="0123456789abcdef", job="bot", namespace="ml", base_model="hf://a/b", base_commit="d" * 40,
        dataset_uri="s3://data/rows.jsonl", dataset_digest=DIGEST, trainer_version="0.1.0", created_at=NOW,
        result=make_result(),
        files=tuple(
            ManifestFile(path=ObjectName(f"model/{number:05}-of-10000.safetensors"), size=4 * GIB, sha256=DIGEST64)
            for number in range(files)
        ),
    )  # fmt: skip


def test_manifest_of_ten_thousand_files_is_within_its_bound(tmp_path: Path) -> None:
    manifest, output = make_manifest(10_000), FileStore(tmp_path.as_uri(), OUTPUT_FIELD)
    output.put(f"{manifest.digest}/{MANIFEST}", manifest_json(manifest))
    assert find_manifest(output, manifest.digest) == manifest
    assert len(manifest_json(manifest)) < 0.6 * MAX_MANIFEST_BYTES


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b'{"files":[' + b"{}," * 100_000 + b"{}]}", id="files"),
        pytest.param(manifest_json(make_manifest(1).model_copy(update={"digest": "x" * MIB})), id="digest"),
    ],
)
def test_log_of_a_planted_manifest_is_short(tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes) -> None:
    output = FileStore(tmp_path.as_uri(), OUTPUT_FIELD)
    output.put(f"0123456789abcdef/{MANIFEST}", content)
    assert find_manifest(output, "0123456789abcdef") is None
    [message] = caplog.messages
    assert len(message) < 2000


def test_message_about_a_result_folder_is_short(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(json.dumps({"result": {"adapter": "s3://" + "x" * MIB}}))
    resolver = SourceResolver(
        PrepareConfig.model_fields["platform"].get_default(call_default_factory=True), environment_secrets()
    )
    with pytest.raises(RunError, match="is a result folder; its adapter is s3://xxx") as caught:
        open_adapter(resolver, tmp_path.as_uri(), "ADAPTER", tmp_path / "work")
    assert len(caught.value.message) < 1000


def test_record_of_a_preparation_that_is_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared_inputs, "MAX_PREPARED_BYTES", 100)
    prepared = make_prepared().model_copy(update={"inputs": "a" * 64})
    output = FileStore(tmp_path.as_uri(), OUTPUT_FIELD)
    output.put(f"{prepared.digest}/prepared/inputs-{'a' * 16}.json", b" " * 101)
    with pytest.raises(RunError, match="larger than 100 bytes"):
        find_inputs(output, prepared)


@pytest.mark.parametrize("content", ["[]", "{", "[" * 100_000, '{"a":' * 200 + "1" + "}" * 200])
def test_report_that_is_no_object_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(OutputError, match=r"report\.json is .*; give another result"):
        read_report_json(Report("bot", tmp_path.as_uri(), None), None)


def write_rows(path: Path, rows: int, characters: int = 1) -> Path:
    row = json.dumps({"prompt": "p", "completion": "c" * characters})
    path.write_text(f"{row}\n" * rows)
    return path


def peak_of(read: Callable[[], object]) -> int:
    """Return the bytes that Python's objects take at most."""
    tracemalloc.start()
    try:
        read()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_preview_of_many_rows_keeps_none_of_them(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "x.jsonl", 20_000, 2000)
    preview_data(path)  # imports
    assert peak_of(lambda: preview_data(path)) < 16 * MIB


@pytest.mark.parametrize(("rows", "expected"), [(2, "2 "), (3, "3 "), (4, "more than 3 ")])
def test_preview_says_whether_it_read_all_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, expected: str
) -> None:
    monkeypatch.setattr(data_preview, "MAX_PREVIEWED", 3)
    assert str(preview_data(write_rows(tmp_path / "x.jsonl", rows))).startswith(expected)


def test_preview_ends_after_many_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_preview, "MAX_CHARACTERS", 5000)
    assert str(preview_data(write_rows(tmp_path / "x.jsonl", 100, 1000))).startswith("more than 5 ")


def test_preview_of_a_pipe_is_an_error(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.jsonl")
    with pytest.raises(PreviewError, match="there is no file"):
        preview_data(tmp_path / "x.jsonl")


def no_job(*lines: str) -> str:
    return "\n".join((JOB, *lines))


LONG_YAML = {
    "templates-without-end": ("{{a" * 200_000 + "\n  - @", "expected ',' or '}'"),
    "statements-without-end": ("{%" * 400_000 + "\n  - @", "cannot start any token"),
    "ends-before-templates": ("}}" + "{{a" * 200_000, "expected"),
    "base-60": ('a: !!int "1' + ":60" * 200_000 + '"', "has 600,001 characters, more than 400"),
    "base-60-float": ('a: !!float "1' + ":59" * 200_000 + '.0"', "has 600,003 characters, more than 400"),
    "binary": ("a: 0b" + "1" * 500_000, "has 500,002 characters, more than 400"),
    "hexadecimal": ("a: 0x" + "f" * 500_000, "has 500,002 characters, more than 400"),
    "repeated-text": (
        "a: &a " + "x" * 500_000 + "\nb: [" + "*a," * 50_000 + "]",
        "has more than 8 MiB of text, with what aliases repeat",
    ),
    "repeated-keys": (
        "a: &a {" + "k" * 1000 + ": 1}\nb: [" + "*a," * 20_000 + "]",
        "has more than 8 MiB of text, with what aliases repeat",
    ),
    "repeated-lists": (
        ("---\na: &a [" + "1," * 300 + "]\nb: [" + "*a," * 300 + "]\n") * 100,
        "has more than 300,000 fields, with what aliases repeat",
    ),
    "nested": ("a: " + "[" * 150 + "1," * 50_000 + "]" * 150, "the nesting is too deep"),
}


@pytest.mark.parametrize(("text", "cause"), LONG_YAML.values(), ids=LONG_YAML)
def test_long_yaml_is_refused_in_linear_time(text: str, cause: str) -> None:
    with pytest.raises(YamlError) as caught:
        parse_documents(text, "job.yaml")
    assert cause in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_values_of_a_file_are_counted_before_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yaml_documents, "MAX_NODES", 100)
    assert parse_documents("- a\n" * 99, "f")[0].value == ["a"] * 99
    for text in ("- a\n" * 100 + "- @ not YAML", "---\na\n" * 101 + "@ not YAML"):
        with pytest.raises(YamlError, match=r"^f:\d+: has more than 100 keys and values; split the file"):
            parse_documents(text, "f")


@pytest.mark.parametrize("number", ["1" * 400, "0x" + "f" * 300, "1." + "0" * 300])
def test_long_number_is_a_number(number: str) -> None:
    assert isinstance(parse_documents(f"a: {number}", "f")[0].value["a"], (int, float))


def unknown_fields(count: int) -> Iterator[str]:
    return (f"  field{number}: 1" for number in range(count))


def duplicate_keys(count: int) -> Iterator[str]:
    return ("  queue: {name: a}" for _ in range(count))


@pytest.mark.parametrize("lines", [unknown_fields, duplicate_keys])
def test_problems_beyond_the_first_are_counted(lines: Callable[[int], Iterator[str]]) -> None:
    [document] = parse_documents(no_job(*lines(5000)), "job.yaml")
    with pytest.raises(ManifestError) as caught:
        parse_manifest(document, ())
    assert len(caught.value.problems) == loader.MAX_PROBLEMS + 1
    assert "more problems from here on; correct these first" in str(caught.value.problems[-1])


def test_problems_are_all_explained_if_they_are_few() -> None:
    [document] = parse_documents(no_job(*unknown_fields(loader.MAX_PROBLEMS)), "job.yaml")
    with pytest.raises(ManifestError) as caught:
        parse_manifest(document, ())
    assert len(caught.value.problems) == loader.MAX_PROBLEMS
    assert "more problems" not in str(caught.value)


def leave_log(folder: Path, content: bytes) -> list[Iterator[archived.ArchivedLine]]:
    path = folder / "support-bot" / "logs" / UID / "attempt-1-node-0-rank-0.jsonl"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    return read_archived_logs(make_left(folder, make_ended(1)), MissingLogs(1), None)


@pytest.mark.parametrize(("tail", "expected"), [(None, 50_000), (3, 3)])
def test_log_of_line_breaks_is_not_kept_as_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tail: int | None, expected: int
) -> None:
    monkeypatch.setattr(archived, "MAX_LOG_BYTES", MIB)  # a buffer of this size is reserved
    lines = 0

    def count() -> None:
        nonlocal lines
        lines = sum(1 for _ in merge_lines(leave_log(tmp_path, b"\n" * 50_000), tail))

    assert peak_of(count) < 4 * MIB
    assert lines == expected


def test_logs_of_an_attempt_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archived, "MAX_LOGS_BYTES", 10)
    assert leave_log(tmp_path, b"x" * 11) == []


@pytest.mark.parametrize("raw", [b"", b"\n", b"a", b"a\n", b"a\r\nb\rc\n\nd", b"\r\r\n\n", b"a\n\r"])
def test_log_is_split_into_lines_as_python_does(raw: bytes) -> None:
    lines = [line.text for line in parse_log(archived.LogFile(1, 0), raw)]
    assert lines == [line.decode() for line in raw.splitlines()]


@pytest.mark.parametrize(
    "text", ["a." * 250_000, "x-hf-" * 100_000, "-eyJaaaaaaaaa" * 20_000], ids=lambda text: text[:5]
)
def test_long_line_is_redacted_in_linear_time(text: str) -> None:
    assert REDACTOR.redact_text(text) == text
