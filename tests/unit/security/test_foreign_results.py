"""Checkpoints, manifests and adapters that somebody planted or changed: skipped with a log line, or refused."""

import base64
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto import mock_aws

from qlora_api.reasons import Reason
from qlora_api.runconfig import S3Config
from qlora_trainer.errors import RunError
from qlora_trainer.inference.published_adapter import PublishedAdapter, fetch_published, open_adapter
from qlora_trainer.publishing.publish import publish, upload_rejected
from qlora_trainer.storage.credentials import Credentials
from qlora_trainer.storage.local_store import FileStore
from qlora_trainer.storage.results import find_manifest, find_merged, find_rejected, find_reusable
from qlora_trainer.storage.s3 import S3Store
from qlora_trainer.storage.store import OUTPUT_FIELD, Store
from qlora_trainer.training.checkpoint_store import CheckpointCallbacks, CheckpointStore
from tests.unit.trainer.results import DIGEST, config, result
from tests.unit.trainer.states import FINGERPRINT, make_state
from tests.unit.trainer.trained import RESOLVER, make_record
from tests.unit.trainer.tuned import NF4

NOW = datetime(2026, 1, 2, tzinfo=UTC)
DEEP = b"[" * 200_000
CHECKPOINTS = f"{FINGERPRINT.digest}/checkpoints"


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, "testing")
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    with mock_aws():
        client = boto3.client("s3", region_name="us-east-1")
        client.create_bucket(Bucket="data")
        yield client


def s3_store(folder: str = "out") -> S3Store:
    return S3Store(f"s3://data/{folder}", OUTPUT_FIELD, Credentials({}), S3Config())


def open_checkpoints(output: Store) -> tuple[CheckpointStore, list[str]]:
    notes: list[str] = []
    return CheckpointStore(output, FINGERPRINT, 1, NOW, CheckpointCallbacks(notes.append, lambda _: None)), notes


def edit(file: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(file.read_text())
    changed = change(content)
    file.write_text(json.dumps(content if changed is None else changed))


def resign(folder: Path) -> None:
    """List the files of a checkpoint as they are: whoever plants one writes its manifest too."""

    def update(manifest: Any) -> None:
        for file in manifest["files"]:
            content = (folder / file["path"]).read_bytes()
            file |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    edit(folder / "manifest.json", update)


def plant(folder: Path, file: str, content: bytes) -> None:
    (folder / file).write_bytes(content)
    resign(folder)


def add_file(folder: Path, path: str) -> None:
    entry = {"path": path, "size": 4, "sha256": hashlib.sha256(b"evil").hexdigest()}
    edit(folder / "manifest.json", lambda manifest: manifest["files"].append(entry))


def link_out(folder: Path) -> None:
    (folder.parents[3] / "secret").write_bytes((folder / "adapter.safetensors").read_bytes())
    (folder / "adapter.safetensors").unlink()
    (folder / "adapter.safetensors").symlink_to(folder.parents[3] / "secret")


def edit_record(folder: Path, change: Callable[[Any], object]) -> None:
    edit(folder / "record.json", change)
    resign(folder)


BROKEN_CHECKPOINTS: dict[str, Callable[[Path], object]] = {
    "file-missing": lambda folder: (folder / "best.safetensors").unlink(),
    "record-not-listed": lambda folder: edit(
        folder / "manifest.json",
        lambda manifest: manifest["files"].remove(
            next(file for file in manifest["files"] if file["path"] == "record.json")
        ),
    ),
    "nothing-listed": lambda folder: edit(folder / "manifest.json", lambda manifest: manifest["files"].clear()),
    "file-listed-twice": lambda folder: edit(
        folder / "manifest.json", lambda manifest: manifest["files"].append(manifest["files"][0])
    ),
    "manifest-cut": lambda folder: (folder / "manifest.json").write_text('{"step": '),
    "manifest-empty": lambda folder: (folder / "manifest.json").write_text(""),
    "manifest-not-utf8": lambda folder: (folder / "manifest.json").write_bytes(b"\xff\xfe\x00"),
    "manifest-nested": lambda folder: (folder / "manifest.json").write_bytes(DEEP),
    "manifest-is-a-list": lambda folder: (folder / "manifest.json").write_text("[]"),
    "manifest-of-wrong-types": lambda folder: edit(
        folder / "manifest.json", lambda manifest: {name: [None] for name in manifest}
    ),
    "manifest-huge": lambda folder: (folder / "manifest.json").write_bytes(b" " * (17 << 20)),
    "lists-absolute-path": lambda folder: add_file(folder, "/tmp/evil"),
    "lists-parent": lambda folder: add_file(folder, "../../../evil"),
    "lists-another-file": lambda folder: add_file(folder, "sitecustomize.py"),
    "negative-size": lambda folder: edit(
        folder / "manifest.json", lambda manifest: manifest["files"][0].update(size=-1)
    ),
    "file-changed": lambda folder: (folder / "record.json").write_bytes(
        (folder / "record.json").read_bytes().replace(b"AdamW", b"AdamX")
    ),
    "file-is-a-folder": lambda folder: ((folder / "record.json").unlink(), (folder / "record.json").mkdir()),
    "file-is-a-link-out": link_out,
    "record-nested": lambda folder: plant(folder, "record.json", DEEP),
    "record-not-utf8": lambda folder: plant(folder, "record.json", b'{"course": "\xff"}'),
    "record-null": lambda folder: plant(folder, "record.json", b"null"),
    "record-huge": lambda folder: edit(
        folder / "manifest.json",
        lambda manifest: next(file for file in manifest["files"] if file["path"] == "record.json").update(size=1 << 40),
    ),
    "record-without-time-zone": lambda folder: edit_record(
        folder, lambda record: record.update(startedAt="2026-01-01T00:00:00")
    ),
    "record-of-other-steps": lambda folder: edit_record(folder, lambda record: record["steps"].pop()),
    "record-of-wrong-types": lambda folder: edit_record(folder, lambda record: record.update(steps={"a": 1})),
    "tensors-garbage": lambda folder: plant(folder, "adapter.safetensors", b"\xff" * 100),
    "tensors-header-nested": lambda folder: plant(
        folder, "optimizer.safetensors", (100_000).to_bytes(8, "little") + b"[" * 100_000
    ),
}

FOREIGN_NAMES: dict[str, Callable[[Path], object]] = {
    "name-with-a-leading-zero": lambda folder: folder.rename(folder.with_name("step-0000005-a1")),
    "name-in-other-digits": lambda folder: folder.rename(
        folder.with_name("step-\u0660\u0660\u0660\u0660\u0660\u0665-a\u0661")
    ),
    "name-of-a-huge-attempt": lambda folder: folder.rename(folder.with_name(f"step-000005-a{'9' * 100}")),
    "name-of-the-last-attempt": lambda folder: (
        folder.rename(folder.with_name("step-000005-a999999999")),
        (folder.with_name("step-000005-a999999999") / "record.json").unlink(),
    ),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save checkpoints of the steps 4 and 5."""
    folder = tmp_path_factory.mktemp("saved") / "out"
    checkpoints, _ = open_checkpoints(FileStore(f"file://{folder}", OUTPUT_FIELD))
    for step in (4, 5):
        checkpoints.save(make_state(step), keep=9)
    return folder


def load_and_save(saved: Path, tmp_path: Path, damage: Callable[[Path], object]) -> list[str]:
    """Resume beside a damaged checkpoint of step 5, save another one, and delete all; return the log."""
    shutil.copytree(saved, tmp_path / "out")
    damage(tmp_path / "out" / CHECKPOINTS / "step-000005-a1")
    before = {path for path in tmp_path.rglob("*") if "out" not in path.parts}
    output = FileStore(f"file://{tmp_path}/out", OUTPUT_FIELD)
    checkpoints, notes = open_checkpoints(output)
    found = checkpoints.load_latest()
    assert found is not None
    assert found.checkpoint_id.step == found.state.step == 4
    log = list(notes)
    checkpoints.save(make_state(5), keep=1)
    again = open_checkpoints(output)[0].load_latest()
    assert again is not None
    assert again.state.step == 5
    checkpoints.delete_all()
    assert {path for path in tmp_path.rglob("*") if "out" not in path.parts} == before
    return log


@pytest.mark.parametrize("damage", BROKEN_CHECKPOINTS.values(), ids=BROKEN_CHECKPOINTS.keys())
def test_planted_checkpoint_is_skipped_with_a_log_line(saved: Path, tmp_path: Path, damage: Callable) -> None:
    *skipped, resumed = load_and_save(saved, tmp_path, damage)
    assert any("step-000005-a1" in note for note in skipped)
    assert resumed.startswith("resumed from step 4")


@pytest.mark.parametrize("rename", FOREIGN_NAMES.values(), ids=FOREIGN_NAMES.keys())
def test_planted_folder_name_is_not_resumed_from(saved: Path, tmp_path: Path, rename: Callable) -> None:
    assert load_and_save(saved, tmp_path, rename)[-1].startswith("resumed from step 4")


@pytest.mark.parametrize(
    "key", ["step-000005-a1//home/u/.bashrc", "/etc/x", "step-000005-a1/../../x", "step-000005-a1/\x1b[2J"]
)
def test_planted_key_does_not_end_a_run(bucket: Any, key: str) -> None:
    checkpoints, notes = open_checkpoints(s3_store())
    checkpoints.save(make_state(4), keep=2)
    bucket.put_object(Bucket="data", Key=f"out/{CHECKPOINTS}/{key}", Body=b"evil")
    found = checkpoints.load_latest()
    assert found is not None
    assert found.state.step == 4
    assert "rename it" in notes[0]
    checkpoints.save(make_state(5), keep=1)
    checkpoints.delete_all()


@pytest.fixture
def files(tmp_path: Path) -> Path:
    adapter = tmp_path / "files/adapter"
    adapter.mkdir(parents=True)
    (adapter / "qlora.json").write_text(make_record(NF4).model_dump_json(by_alias=True))
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    (adapter / "chat_template.jinja").write_bytes(b"{{ messages }}")
    return tmp_path / "files"


@pytest.fixture
def output(tmp_path: Path, files: Path) -> FileStore:
    """Publish a result next to the folder of another one."""
    store = FileStore(f"file://{tmp_path}/colours", OUTPUT_FIELD)
    publish(store, config(store.root), published_as(store), files, NOW)
    store.put("fedcba9876543210/adapter/adapter_model.safetensors", b"of another result")
    (tmp_path / "thesis.txt").write_text("mine")
    return store


def published_as(store: Store, folder: str = "adapter", loss: float = 1.0):
    prefix = f"{store.root}/{DIGEST}"
    return result(loss).model_copy(update={"adapter": f"{prefix}/{folder}", "report": f"{prefix}/report/report.json"})


def change_manifest(output: FileStore, change: Callable[[Any], object]) -> None:
    edit(output.folder / DIGEST / "manifest.json", change)


BROKEN_RESULTS: dict[str, Callable[[FileStore], object]] = {
    "file-missing": lambda output: output.delete(f"{DIGEST}/adapter/chat_template.jinja"),
    "file-longer": lambda output: output.put(f"{DIGEST}/adapter/chat_template.jinja", b"{{ messages }} and more"),
    "file-of-equal-size": lambda output: output.put(f"{DIGEST}/adapter/chat_template.jinja", b"{{ 'evil!!' }}"),
    "manifest-cut": lambda output: output.put(f"{DIGEST}/manifest.json", b"{"),
    "manifest-nested": lambda output: output.put(f"{DIGEST}/manifest.json", DEEP),
    "manifest-not-utf8": lambda output: output.put(f"{DIGEST}/manifest.json", b"\xff\xfe"),
    "manifest-huge": lambda output: output.put(f"{DIGEST}/manifest.json", b" " * (17 << 20)),
    "manifest-of-wrong-types": lambda output: change_manifest(output, lambda found: dict.fromkeys(found, 1)),
    "manifest-of-another-result": lambda output: change_manifest(
        output, lambda found: found.update(digest="fedcba9876543210")
    ),
    "lists-a-parent": lambda output: change_manifest(
        output, lambda found: found["files"][0].update(path="../../thesis.txt")
    ),
    "lists-an-absolute-path": lambda output: change_manifest(
        output, lambda found: found["files"][0].update(path="/etc/passwd")
    ),
}


@pytest.mark.parametrize("damage", BROKEN_RESULTS.values(), ids=BROKEN_RESULTS.keys())
def test_broken_result_is_not_reused_and_is_replaced(
    output: FileStore, files: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[FileStore], object]
) -> None:
    damage(output)
    assert find_reusable(output, DIGEST, "Skip", "") is None
    assert len(caplog.messages) == 1
    found = publish(output, config(output.root), published_as(output, loss=2.0), files, NOW)
    assert found.evaluation.base.loss == 2.0
    reusable = find_reusable(output, DIGEST, "Skip", "")
    assert reusable is not None
    assert reusable.result == found
    assert (output.folder.parent / "thesis.txt").read_text() == "mine"
    assert output.exists("fedcba9876543210/adapter/adapter_model.safetensors")


@pytest.mark.parametrize("content", [b"{", DEEP, b"\xff", b"[]"])
def test_planted_manifests_of_other_kinds_are_skipped(output: FileStore, content: bytes) -> None:
    output.put(f"{DIGEST}/rejected/rejected.json", content)
    output.put(f"{DIGEST}/merged/original/manifest.json", content)
    assert find_rejected(output, DIGEST) is None
    assert find_merged(output, DIGEST, "original", "a") is None


def test_replaced_manifest_deletes_files_of_its_result_only(output: FileStore, files: Path) -> None:
    """The manifest that is replaced may list objects that no result has: rows, checkpoints, the manifest itself."""
    kept = ("prepared/train.parquet", "checkpoints/step-000001-a1/manifest.json", "manifest.json")
    for path in kept[:2]:
        output.put(f"{DIGEST}/{path}", b"kept")
    entries = [{"path": path, "size": 4, "sha256": hashlib.sha256(b"kept").hexdigest()} for path in kept]
    change_manifest(output, lambda found: found["files"].extend(entries))
    base = config(output.root)
    overwrite = base.spec.output.model_copy(update={"if_exists": "Overwrite"})
    spec = base.spec.model_copy(update={"output": overwrite})
    (files / "adapter/adapter_model.safetensors").write_bytes(b"other weights")
    publish(output, base.model_copy(update={"spec": spec, "uid": "u"}), published_as(output), files, NOW)
    assert all(output.exists(f"{DIGEST}/{path}") for path in kept)
    assert not output.exists(f"{DIGEST}/adapter/adapter_model.safetensors")


@pytest.mark.parametrize("plant", ["metadata", "checksum", "equal"])
def test_planted_file_is_believed_by_its_content_only(bucket: Any, files: Path, plant: str) -> None:
    """The files of a tokenizer are known before a run; some servers return the checksum that they were sent."""
    honest = (files / "adapter/chat_template.jinja").read_bytes()
    arguments: dict[str, Any] = {"Metadata": {"sha256": hashlib.sha256(honest).hexdigest()}}
    if plant == "checksum":
        arguments["ChecksumSHA256"] = base64.b64encode(hashlib.sha256(honest).digest()).decode()
    body = honest if plant == "equal" else b"{{ EVIL }}"
    bucket.put_object(Bucket="data", Key=f"out/{DIGEST}/adapter/chat_template.jinja", Body=body, **arguments)
    store = s3_store()
    found = publish(store, config(store.root), published_as(store), files, NOW)
    assert (found.adapter == f"{store.root}/{DIGEST}/adapter") is (plant == "equal")
    manifest = find_manifest(store, DIGEST)
    assert manifest is not None
    for file in manifest.files:
        assert hashlib.sha256(store.read(f"{DIGEST}/{file.path}")).hexdigest() == file.sha256


def opened(output: Store, work: Path, folder: str = "adapter") -> PublishedAdapter:
    return open_adapter(RESOLVER, f"{output.root}/{DIGEST}/{folder}", "ADAPTER", work)


@pytest.fixture(params=["file", "s3"])
def published(request: pytest.FixtureRequest, tmp_path: Path, files: Path) -> Store:
    if request.param == "s3":
        request.getfixturevalue("bucket")
    local = f"file://{tmp_path}/out/colours"
    store: Store = s3_store("out/colours") if request.param == "s3" else FileStore(local, OUTPUT_FIELD)
    publish(store, config(store.root), published_as(store), files, NOW)
    return store


def test_planted_manifest_without_files_is_not_taken_for_the_result(output: FileStore, files: Path) -> None:
    """It appears while a run trains: the run must upload its own files, and not report those that are not there."""
    change_manifest(output, lambda found: found.update(files=[]))
    for name in names_in(output.folder / DIGEST / "adapter"):
        output.delete(f"{DIGEST}/adapter/{name}")
    publish(output, config(output.root), published_as(output), files, NOW)
    published = find_reusable(output, DIGEST, "Skip", "")
    assert published is not None
    assert {file.path for file in published.files} >= {f"adapter/{name}" for name in LISTED}


def names_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


LISTED = ["adapter_model.safetensors", "chat_template.jinja", "qlora.json"]


def test_adapter_has_the_files_of_its_manifest_and_no_others(published: Store, tmp_path: Path) -> None:
    for name in ("evil.py", "adapter_model.bin", "tokenizer_config.json", "sub/x.json"):
        published.put(f"{DIGEST}/adapter/{name}", b"evil")
    found = opened(published, tmp_path / "work")
    assert names_in(found.folder) == LISTED
    assert (found.verified, found.caveat) == (True, "")
    folder = fetch_published(published, DIGEST, f"{published.root}/{DIGEST}/adapter", tmp_path / "work")
    assert names_in(folder) == LISTED


CHANGES = {"equal-size": b"{{ 'evil!!' }}", "longer": b"{{ messages }}{{ 'evil' }}", "empty": b"", "missing": None}


@pytest.mark.parametrize("content", CHANGES.values(), ids=CHANGES.keys())
def test_altered_adapter_is_not_opened(published: Store, tmp_path: Path, content: bytes | None) -> None:
    path = f"{DIGEST}/adapter/chat_template.jinja"
    published.delete(path) if content is None else published.put(path, content)
    uri = f"{published.root}/{DIGEST}/adapter"
    for fetch in (
        lambda work: opened(published, work),
        lambda work: fetch_published(published, DIGEST, uri, work),
    ):
        with pytest.raises(
            RunError, match=r"chat_template\.jinja is missing or does not match .*; restore it"
        ) as error:
            fetch(tmp_path / "work")
        assert error.value.reason is Reason.UPLOAD_FAILED


def test_altered_copy_of_an_adapter_is_downloaded_again(published: Store, tmp_path: Path) -> None:
    folder = opened(published, tmp_path / "work").folder
    (folder / "chat_template.jinja").write_bytes(b"{{ 'evil!!' }}")
    again = opened(published, tmp_path / "work").folder
    assert (again, (again / "chat_template.jinja").read_bytes()) == (folder, b"{{ messages }}")


def test_adapter_that_the_manifest_does_not_list_is_refused(published: Store, tmp_path: Path) -> None:
    record = make_record(NF4).model_dump_json(by_alias=True).encode()
    published.put(f"{DIGEST}/other/qlora.json", record)
    with pytest.raises(RunError, match=r"does not list .*/other; give the adapter that the manifest names"):
        opened(published, tmp_path / "work", "other")
    for adapter in (f"{published.root}/{DIGEST}/other", "s3://elsewhere/adapter", f"{published.root}/{DIGEST}"):
        with pytest.raises(RunError, match="does not list the adapter"):
            fetch_published(published, DIGEST, adapter, tmp_path / "work")


@pytest.mark.parametrize("content", [None, b"{", DEEP, b"\xff", b"{}"])
def test_adapter_without_a_manifest_is_opened_with_a_caveat(
    published: Store, tmp_path: Path, content: bytes | None
) -> None:
    path = f"{DIGEST}/manifest.json"
    published.delete(path) if content is None else published.put(path, content)
    found = opened(published, tmp_path / "work")
    assert "NOT verified" in found.caveat
    with pytest.raises(RunError, match="does not list the adapter"):
        fetch_published(published, DIGEST, f"{published.root}/{DIGEST}/adapter", tmp_path / "work")


@pytest.mark.usefixtures("bucket")
def test_code_of_an_unverified_adapter_is_not_downloaded(tmp_path: Path) -> None:
    store = s3_store()
    for name in ("evil.py", "adapter_model.bin", "sub/evil.pkl"):
        store.put(f"{DIGEST}/adapter/{name}", b"evil")
    store.put(f"{DIGEST}/adapter/qlora.json", make_record(NF4).model_dump_json(by_alias=True).encode())
    assert names_in(opened(store, tmp_path).folder) == ["qlora.json"]


def test_rejected_adapter_is_verified_against_its_record(published: Store, files: Path, tmp_path: Path) -> None:
    upload_rejected(published, config(published.root), published_as(published), files, NOW)
    assert opened(published, tmp_path / "work", "rejected/adapter").verified
    published.put(f"{DIGEST}/rejected/adapter/chat_template.jinja", b"{{ 'evil!!' }}")
    with pytest.raises(RunError, match="does not match size and SHA-256"):
        opened(published, tmp_path / "other", "rejected/adapter")


@pytest.mark.parametrize(
    "field",
    [
        {"attention": "evil/kernel"},
        {"dtype": "load"},
        {"base": "/home/u/models"},
        {"base": "hf://../../x"},
        {"base": "s3://bucket/../x"},
        {"commit": "../../secret"},
    ],
)
def test_record_of_an_adapter_names_nothing_outside(tmp_path: Path, field: dict[str, str]) -> None:
    """Transformers downloads a kernel, which is code, for an attention implementation that it does not know."""
    content = json.loads(make_record(NF4).model_dump_json(by_alias=True)) | field
    (tmp_path / "qlora.json").write_text(json.dumps(content))
    with pytest.raises(RunError, match=rf"qlora\.json: {next(iter(field))}: "):
        open_adapter(RESOLVER, f"file://{tmp_path}", "ADAPTER", tmp_path / "work")


@pytest.mark.parametrize("content", [b"{", DEEP, b"\xff", b"[]", b'{"result": 3}', b"null", b"{}"])
def test_result_folder_with_a_planted_manifest_is_rejected(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(RunError, match="give the folder 'adapter' of a published result"):
        open_adapter(RESOLVER, f"file://{tmp_path}", "ADAPTER", tmp_path / "work")
