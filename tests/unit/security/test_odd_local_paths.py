"""Paths that no file has, from arguments and manifests: a message with field, cause and fix, and no traceback."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from qlora_api.runconfig import S3Config
from qlora_api.v1alpha1 import ModelSpec
from qlora_cli.__main__ import app
from qlora_cli.local.data_preview import PreviewError, preview_data
from qlora_cli.manifests.model_config import NoConfigError, load_config
from qlora_cli.uris import LocalPathError, to_display_path, to_uri, using_path
from qlora_trainer.data.rows import RowError, size_of
from qlora_trainer.errors import RunError
from qlora_trainer.model.model_files import check_model_files
from qlora_trainer.storage.credentials import Credentials
from qlora_trainer.storage.local_store import FileStore
from qlora_trainer.storage.s3 import S3Store
from qlora_trainer.storage.safetensors_headers import fetch_headers
from qlora_trainer.storage.store import DATASET_FIELD, MODEL_FIELD, local_path
from tests.unit.cli.make import JOB

LONG = "a" * 300
ODD_PATHS = {
    "~nosuchuser/x": "~nosuchuser/x",
    "./loop/x": "loop",
    "file:///a%00b": "null character",
    f"./{LONG}": "too long",
    "./half\udcff": "half a character",
}
COMMANDS = {
    "report": ["report", "PATH"],
    "serve-snippet": ["serve-snippet", "PATH"],
    "init --data": ["init", "job.yaml", "--data", "PATH"],
    "init --model": ["init", "job.yaml", "--model", "PATH"],
    "init --to": ["init", "job.yaml", "--to", "PATH"],
    "merge": ["merge", "PATH", "--to", "merged"],
    "merge --base-model": ["merge", "adapter", "--to", "merged", "--base-model", "PATH"],
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a circle of links."""
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("path", ODD_PATHS)
@pytest.mark.parametrize("command", COMMANDS)
def test_argument_that_is_no_path_is_refused_with_its_cause(command: str, path: str) -> None:
    words = [path if word == "PATH" else word for word in COMMANDS[command]]
    ended = CliRunner().invoke(app, words)
    assert isinstance(ended.exception, SystemExit), ended.exception
    assert ended.exit_code == 1
    assert ODD_PATHS[path] in ended.output


@pytest.mark.parametrize("path", ODD_PATHS)
def test_field_of_a_manifest_that_is_no_path_is_refused_with_its_line(folder: Path, path: str) -> None:
    job = JOB if isinstance(JOB, dict) else yaml.safe_load(JOB)
    job = {**job, "spec": {**job["spec"], "dataset": {"uri": path}}}
    (folder / "job.yaml").write_text(yaml.safe_dump(job))
    ended = CliRunner().invoke(app, ["validate", "job.yaml"])
    assert isinstance(ended.exception, SystemExit), ended.exception
    assert "job.yaml" in ended.output
    assert "spec.dataset.uri: " in ended.output


@pytest.mark.parametrize("text", ["http://[x", "//[x", "[://x", "ftp://x"])
@pytest.mark.parametrize("command", ["report", "serve-snippet"])
def test_argument_that_is_no_uri_is_refused(command: str, text: str) -> None:
    ended = CliRunner().invoke(app, [command, text])
    assert isinstance(ended.exception, SystemExit), ended.exception
    assert ended.exit_code == 1


@pytest.mark.parametrize(
    "uri", ["file://localhost/etc/../x#y?z", "file:///a;b?c", "file:///a%23b", "file:///[x", "file://localhost"]
)
def test_shown_path_is_the_one_that_is_read(uri: str) -> None:
    assert to_display_path(uri) == str(local_path(uri))


def test_uri_of_a_readable_path_is_unchanged(folder: Path) -> None:
    assert to_uri(f"file://{folder}/x#y?z", "NAME") == f"file://{folder}/x#y?z"


@pytest.mark.parametrize("content", [b"\xff\xfe", LONG.encode(), b"a\0b"], ids=["not-utf-8", "long", "null"])
def test_ref_of_a_hub_cache_that_names_no_commit_is_no_config(folder: Path, content: bytes) -> None:
    refs = folder / "models--a--b/refs"
    refs.mkdir(parents=True)
    (refs / "main").write_bytes(content)
    with pytest.raises(NoConfigError, match="hf download a/b"):
        load_config(ModelSpec(uri="hf://a/b"), None, folder.as_uri())


@pytest.fixture
def deep(folder: Path) -> Iterator[Path]:
    """A folder with 1,500 nested ones, more than Python's calls may nest; pytest could not delete them."""
    nested = [folder / "deep" / "/".join(["d"] * depth) for depth in range(1, 1501)]
    (folder / "deep").mkdir()
    for path in nested:
        path.mkdir()
    yield folder / "deep"
    for path in reversed(nested):
        path.rmdir()


def test_file_beside_very_deep_folders_is_listed(deep: Path) -> None:
    (deep / "rows.jsonl").write_text("{}")
    assert [entry.path for entry in FileStore(deep.as_uri(), DATASET_FIELD).list()] == ["rows.jsonl"]
    check_model_files(deep)


def test_link_to_a_name_that_is_too_long_is_reported_and_skipped(folder: Path) -> None:
    (folder / "odd").symlink_to(LONG)
    (folder / "rows.jsonl").write_text("{}")
    refused: list[str] = []
    entries = FileStore(folder.as_uri(), DATASET_FIELD).list("", refused.append)
    assert [entry.path for entry in entries] == ["rows.jsonl"]
    assert any("odd cannot be read: File name too long" in message for message in refused)


def test_data_file_that_is_a_link_to_a_long_name_is_an_error(folder: Path) -> None:
    (folder / "odd.jsonl").symlink_to(LONG)
    with pytest.raises(RunError, match=r"spec\.dataset\.uri: .*odd\.jsonl cannot be read"):
        FileStore(folder.as_uri(), DATASET_FIELD).list()
    with pytest.raises(RunError, match="cannot access"):
        FileStore(folder.as_uri(), DATASET_FIELD).exists("odd.jsonl")


def test_parquet_map_with_bytes_as_keys_is_refused(folder: Path) -> None:
    row = pa.array([[(b"k", "v")]], pa.map_(pa.binary(), pa.string()))
    pq.write_table(pa.table({"text": ["a"], "meta": row}), folder / "rows.parquet")
    with pytest.raises(PreviewError, match="keys are not text; write the keys as text"):
        preview_data(folder / "rows.parquet")
    with pytest.raises(RowError, match="keys are not text"):
        size_of({b"k": "v"})


@pytest.mark.parametrize("size", ["9" * 5000, "1" + "0" * 30, "many", "-1"])
def test_store_that_announces_an_absurd_size_is_refused(size: str) -> None:
    store = S3Store("s3://data/model", MODEL_FIELD, Credentials({}), S3Config())
    answer = {"Body": None, "ContentRange": f"bytes 0-7/{size}", "ContentLength": 8}

    class _Body:
        def __enter__(self) -> "_Body":
            return self

        def __exit__(self, *_: object) -> None: ...

        def read(self, _count: int) -> bytes:
            return b""

    answer["Body"] = _Body()
    store._client = SimpleNamespace(get_object=lambda **_: answer)  # type: ignore[assignment]
    with pytest.raises(RunError, match=r"spec\.model\.uri: .*does not say how long it is"):
        store.read_start("model.safetensors", 8)


def test_header_of_more_bytes_than_a_file_can_have_is_refused(folder: Path) -> None:
    size = 10**18
    header = b'{"w":{"dtype":"I8","shape":[1],"data_offsets":[0,%d]}}'
    length = len(header % size)
    content = length.to_bytes(8, "little") + header % (size - 8 - length)
    snapshot = SimpleNamespace(read_start=lambda _name, count: (content[:count], size))
    with pytest.raises(RunError, match=r"spec\.model\.uri: model\.safetensors "):
        fetch_headers(snapshot, ["model.safetensors"], folder, MODEL_FIELD)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    [
        "? [a]\n: 1\n",
        "a: !!int x",
        "&a [*a]",
        "gpuPrices: {a: !!timestamp 9}",
        "a: 1\na: 2\n",
        "[" * 3000,
        "--- 1\n--- 2",
    ],
)
def test_odd_prices_are_refused(folder: Path, text: str) -> None:
    (folder / "prices.yaml").write_text(text)
    ended = CliRunner().invoke(app, ["usage", "--prices", "prices.yaml"], env={"COLUMNS": "400"})
    assert isinstance(ended.exception, SystemExit), ended.exception
    assert ended.exit_code == 2
    assert "prices.yaml" in ended.output


def test_link_to_nothing_is_no_new_manifest(folder: Path) -> None:
    """The working folder may be somebody else's, and the link lead to a file that a shell runs."""
    (folder / "job.yaml").symlink_to(folder / "elsewhere")
    ended = CliRunner().invoke(app, ["init", "job.yaml", "--model", "hf://a/b", "--data", "s3://bucket/x.jsonl"])
    assert (ended.exit_code, (folder / "elsewhere").exists()) == (1, False)
    assert "job.yaml already exists; choose another name, or use --force" in ended.output


def test_bare_word_that_no_file_can_be_named_is_refused() -> None:
    word = "a" * 5000
    ended = CliRunner().invoke(app, ["init", "job.yaml", "--model", "hf://a/b", "--data", word])
    assert isinstance(ended.exception, SystemExit), ended.exception
    assert (ended.exit_code, "--data: " in ended.output, "too long" in ended.output) == (1, True, True)


def test_error_of_the_operating_system_that_is_about_no_given_path_keeps_its_traceback(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is about a path is said where it is used, and not guessed from the arguments."""

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device", str(folder / "job.yaml"))

    monkeypatch.setattr("qlora_cli.commands.init.choose_fields", fail)
    ended = CliRunner().invoke(app, ["init", "job.yaml", "--model", "hf://a/b", "--data", "s3://bucket/x.jsonl"])
    assert isinstance(ended.exception, OSError)


def test_folder_of_a_report_that_cannot_be_written_is_refused(folder: Path) -> None:
    (folder / "file").write_text("")
    refused = pytest.raises(
        LocalPathError, match=r"--to: '.*file/report' cannot be used: Not a directory; correct the path"
    )
    with refused, using_path(folder / "file/report", "--to"):
        (folder / "file/report").mkdir()
