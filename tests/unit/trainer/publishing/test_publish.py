"""Publishing: the manifest is written last, once, and is correct; S3 errors map to reasons (with moto)."""

import json
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import boto3
import pytest
from botocore.exceptions import ClientError
from moto import mock_aws

from qlora_api.names import SecretRole
from qlora_api.reasons import Reason
from qlora_api.report import MergedManifest, MergeReport, ResultManifest
from qlora_api.result import Result
from qlora_api.runconfig import RunConfig, S3Config
from qlora_api.v1alpha1 import ManifestRef
from qlora_trainer.errors import RunError
from qlora_trainer.publishing.publish import publish, upload_rejected
from qlora_trainer.storage.credentials import Credentials
from qlora_trainer.storage.listed_files import describe_files
from qlora_trainer.storage.local_store import FileStore
from qlora_trainer.storage.results import (
    find_merged,
)
from qlora_trainer.storage.s3 import S3Store
from qlora_trainer.storage.store import (
    DATASET_FIELD,
    MODEL_FIELD,
    OUTPUT_FIELD,
    MissingObjectError,
    ObjectExistsError,
    sha256_of,
)
from tests.unit.trainer.results import DIGEST, config, result

NOW = datetime(2026, 1, 2, tzinfo=UTC)
KEYS = Credentials({"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_REGION": "us-east-1"})


class RecordingStore(FileStore):
    """A folder that records the order of its writes."""

    def __init__(self, folder: Path) -> None:
        super().__init__(f"file://{folder}", OUTPUT_FIELD)
        self.writes: list[str] = []

    def put(self, path: str, source: Path | bytes, *, if_none_match: bool = False) -> None:
        super().put(path, source, if_none_match=if_none_match)
        self.writes.append(path)


@pytest.fixture
def files(tmp_path) -> Path:
    folder = tmp_path / "files"
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter/adapter_model.safetensors").write_bytes(b"weights")
    (folder / "adapter/adapter_config.json").write_bytes(b"{}")
    return folder


def test_manifest_is_written_after_all_files_and_before_latest(tmp_path, files):
    store = RecordingStore(tmp_path / "output")
    publish(store, config(store.root), result(1.0), files, NOW)
    assert store.writes == [
        f"{DIGEST}/adapter/adapter_config.json",
        f"{DIGEST}/adapter/adapter_model.safetensors",
        f"{DIGEST}/manifest.json",
        "latest.json",
    ]
    manifest = ResultManifest.model_validate_json(store.read(f"{DIGEST}/manifest.json"))
    assert manifest.files == describe_files(files)
    assert json.loads(store.read("latest.json")) == {
        "digest": DIGEST,
        "manifest": f"{store.root}/{DIGEST}/manifest.json",
    }


def test_second_publisher_publishes_its_own_result_beside_the_first(tmp_path, files):
    class Racing(RecordingStore):
        """Another publisher writes its manifest during this upload."""

        def put(self, path: str, source: Path | bytes, *, if_none_match: bool = False) -> None:
            if path == f"{DIGEST}/manifest.json":
                rival = RecordingStore(tmp_path / "output")
                FileStore.put(rival, path, first.read(path))
            super().put(path, source, if_none_match=if_none_match)

    first = RecordingStore(tmp_path / "first")
    publish(first, config(first.root), result(1.0), files, NOW)
    second = Racing(tmp_path / "output")
    found = publish(second, config(second.root), result(2.0), files, NOW)
    assert check_beside(second, found).result.evaluation == result(2.0).evaluation
    assert second.read(f"{DIGEST}/manifest.json") == first.read(f"{DIGEST}/manifest.json")


def check_manifest(store: FileStore | S3Store) -> ResultManifest:
    """Check that every file of the manifest exists with its checksum, and return the manifest."""
    manifest = ResultManifest.model_validate_json(store.read(f"{DIGEST}/manifest.json"))
    for file in manifest.files:
        assert sha256_of(store.read(f"{DIGEST}/{file.path}")) == file.sha256, file.path
    return manifest


def check_beside(store: FileStore | S3Store, found: Result) -> ResultManifest:
    """Check a result that was published beside another one, which may be forged, and return its manifest."""
    folder = found.adapter.removeprefix(f"{store.root}/").removesuffix("/adapter")
    latest = {"digest": DIGEST, "manifest": f"{store.root}/{folder}/manifest.json"}
    assert (folder.count("/"), json.loads(store.read("latest.json"))) == (1, latest)
    manifest = ResultManifest.model_validate_json(store.read(f"{folder}/manifest.json"))
    assert manifest.result == found
    for file in manifest.files:
        assert f"{DIGEST}/{file.path}".startswith(f"{folder}/")
        assert sha256_of(store.read(f"{DIGEST}/{file.path}")) == file.sha256, file.path
    return manifest


def test_second_publisher_does_not_replace_files(tmp_path, files):
    class Slow(RecordingStore):
        """Another publisher publishes its result after this one checked for a manifest."""

        def put(self, path: str, source: Path | bytes, *, if_none_match: bool = False) -> None:
            if not self.writes:
                self.writes.append("")
                publish(RecordingStore(tmp_path / "output"), config(self.root), result(1.0), winner, NOW)
            super().put(path, source, if_none_match=if_none_match)

    winner = tmp_path / "winner"
    shutil.copytree(files, winner)
    (files / "adapter/adapter_model.safetensors").write_bytes(b"other weights")
    store = Slow(tmp_path / "output")
    check_beside(store, publish(store, config(store.root), result(2.0), files, NOW))
    assert check_manifest(store).files == describe_files(winner)


@pytest.mark.usefixtures("bucket")
@pytest.mark.parametrize("kind", ["file", "s3"])
def test_files_of_a_crashed_attempt_are_never_replaced(tmp_path, files, kind):
    store = s3_store() if kind == "s3" else RecordingStore(tmp_path / "output")
    store.put(f"{DIGEST}/adapter/adapter_config.json", b"{}")
    store.put(f"{DIGEST}/adapter/adapter_model.safetensors", b"old weights")
    found = publish(store, config(store.root), result(1.0), files, NOW)
    manifest = check_manifest(store)
    assert manifest.result == found
    assert store.read(f"{DIGEST}/adapter/adapter_model.safetensors") == b"old weights"
    folder = found.adapter.removeprefix(f"{store.root}/")
    assert (folder.split("/")[0], folder.split("/")[-1], folder.count("/")) == (DIGEST, "adapter", 2)
    assert store.read(f"{folder}/adapter_model.safetensors") == b"weights"
    assert found.report == found.adapter.removesuffix("adapter") + "report/report.json"


def overwriting(root: str, run: str) -> RunConfig:
    """The run of a QLoRAJob that replaces the results of other runs."""
    base = config(root)
    output = base.spec.output.model_copy(update={"if_exists": "Overwrite"})
    return base.model_copy(update={"spec": base.spec.model_copy(update={"output": output}), "uid": run})


def published_paths(store: FileStore | S3Store) -> set[str]:
    return {entry.path.removeprefix(f"{DIGEST}/") for entry in store.list() if entry.path.startswith(DIGEST)}


@pytest.mark.usefixtures("bucket")
@pytest.mark.parametrize("kind", ["file", "s3"])
def test_overwritten_result_is_complete_and_its_files_are_deleted(tmp_path, files, kind):
    store = s3_store() if kind == "s3" else RecordingStore(tmp_path / "output")
    publish(store, config(store.root), result(1.0), files, NOW)
    store.put(f"{DIGEST}/merged/original/model.safetensors", b"merged from the first")
    (files / "adapter/adapter_model.safetensors").write_bytes(b"other weights")
    found = publish(store, overwriting(store.root, "second"), result(2.0), files, NOW)
    manifest = check_manifest(store)
    assert (manifest.run, manifest.result, found.evaluation.base.loss) == ("second", found, 2.0)
    assert published_paths(store) == {"manifest.json", *(file.path for file in manifest.files)}
    third = publish(store, overwriting(store.root, "third"), result(3.0), files, NOW)
    assert (check_manifest(store).run, third.evaluation.base.loss) == ("third", 3.0)


def test_trap_41_files_of_an_overwritten_result_are_never_replaced(tmp_path, files):
    store = RecordingStore(tmp_path / "output")
    publish(store, config(store.root), result(1.0), files, NOW)
    first = {path for path in store.writes if path.startswith(f"{DIGEST}/adapter/")}
    store.writes.clear()
    (files / "adapter/adapter_model.safetensors").write_bytes(b"other weights")
    publish(store, overwriting(store.root, "second"), result(2.0), files, NOW)
    assert not first & set(store.writes)


@pytest.mark.parametrize(
    ("run", "replaced"),
    [
        pytest.param("first", False, id="result-of-an-earlier-attempt-is-kept"),
        pytest.param("second", True, id="result-of-another-run-is-replaced"),
        pytest.param("", True, id="without-uid-is-replaced"),
    ],
)
def test_overwrite_replaces_only_results_of_other_runs(tmp_path, files, run, replaced):
    store = RecordingStore(tmp_path / "output")
    publish(store, overwriting(store.root, "first"), result(1.0), files, NOW)
    found = publish(store, overwriting(store.root, run), result(2.0), files, NOW)
    assert found.evaluation.base.loss == 2.0
    assert (check_manifest(store).result == found) is replaced


def test_merged_model_of_a_replaced_adapter_is_not_found(tmp_path, files):
    store = RecordingStore(tmp_path / "output")
    first = publish(store, config(store.root), result(1.0), files, NOW)
    manifest = MergedManifest(
        digest=DIGEST, model="m", adapter=first.adapter, base_model="hf://o/m", base_commit="c", created_at=NOW,
        merge=MergeReport(base="original"), files=describe_files(files),
    )  # fmt: skip
    store.put(f"{DIGEST}/merged/original/manifest.json", manifest.model_dump_json(by_alias=True).encode())
    assert find_merged(store, DIGEST, "original", first.adapter) == "m"
    assert find_merged(store, DIGEST, "original", f"{first.adapter}-of-another-run") is None


def test_equal_files_of_a_crashed_attempt_are_used(tmp_path, files):
    store = RecordingStore(tmp_path / "output")
    store.put(f"{DIGEST}/adapter/adapter_model.safetensors", b"weights")
    assert publish(store, config(store.root), result(1.0), files, NOW) == result(1.0)
    assert check_manifest(store).files == describe_files(files)


def test_published_result_is_not_changed(tmp_path, files):
    store = RecordingStore(tmp_path / "output")
    publish(store, config(store.root), result(1.0), files, NOW)
    first = {path: store.read(path) for path in store.writes if path != "latest.json"}
    check_beside(store, publish(store, config(store.root), result(2.0), files, NOW))
    assert {path: store.read(path) for path in first} == first


@pytest.mark.parametrize("there", ["nothing", "a-result", "a-replaced-result", "a-rejected-result"])
def test_manifest_is_announced_as_it_is_written_and_before(tmp_path, files, there):
    store, announced = RecordingStore(tmp_path / "output"), []
    if there != "nothing":
        publish(store, config(store.root), result(1.0), files, NOW)

    def announce(manifest: ManifestRef) -> None:
        announced.append((manifest, store.exists(path_of(manifest)) and store.read(path_of(manifest))))

    def path_of(manifest: ManifestRef) -> str:
        return manifest.uri.removeprefix(f"{store.root}/")

    run = overwriting(store.root, "second") if there == "a-replaced-result" else config(store.root)
    (upload_rejected if there == "a-rejected-result" else publish)(store, run, result(2.0), files, NOW, announce)
    manifest, before = announced[-1]
    assert sha256_of(store.read(path_of(manifest))) == manifest.digest
    assert before != store.read(path_of(manifest))


@pytest.fixture
def bucket(monkeypatch) -> Iterator[None]:
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    with mock_aws():
        boto3.client("s3", region_name="us-east-1").create_bucket(Bucket="adapters")
        yield


def s3_store(uri: str = "s3://adapters/team-a/job", field_ref=OUTPUT_FIELD, **settings: str) -> S3Store:
    return S3Store(uri, field_ref, KEYS, S3Config.model_validate(settings))


@pytest.mark.usefixtures("bucket")
@pytest.mark.parametrize("checksums", ["when_supported", "when_required"])
def test_s3_store_round_trip(tmp_path, checksums):
    store = s3_store(checksums=checksums)
    (tmp_path / "file").write_bytes(b"content")
    store.put("x/a.bin", tmp_path / "file")
    store.put("b.json", b"{}")
    assert [(entry.path, entry.size) for entry in store.list()] == [("b.json", 2), ("x/a.bin", 7)]
    assert [entry.path for entry in store.list("x")] == ["x/a.bin"]
    assert (store.read("x/a.bin"), store.exists("b.json"), store.exists("c")) == (b"content", True, False)
    store.download("x/a.bin", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"content"
    store.delete("b.json")
    store.delete("b.json")
    assert not store.exists("b.json")


@pytest.mark.usefixtures("bucket")
def test_s3_writes_a_manifest_once(files):
    store = s3_store()
    publish(store, config(store.root), result(1.0), files, NOW)
    with pytest.raises(ObjectExistsError):
        store.put(f"{DIGEST}/manifest.json", b"{}", if_none_match=True)
    check_beside(store, publish(store, config(store.root), result(2.0), files, NOW))


@pytest.mark.usefixtures("bucket")
@pytest.mark.parametrize(
    ("field_ref", "reason"),
    [
        (MODEL_FIELD, Reason.MODEL_NOT_FOUND),
        (DATASET_FIELD, Reason.DATASET_NOT_FOUND),
        (OUTPUT_FIELD, Reason.OUTPUT_NOT_FOUND),
    ],
)
def test_missing_bucket_is_reported_for_the_field_that_names_it(field_ref, reason):
    with pytest.raises(MissingObjectError, match="bucket 'nowhere' does not exist") as caught:
        s3_store("s3://nowhere/x", field_ref).read("y")
    assert (caught.value.reason, caught.value.message.startswith(field_ref.field)) == (reason, True)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("AccessDenied", Reason.S3_DENIED),
        ("403", Reason.S3_DENIED),
        ("InvalidAccessKeyId", Reason.S3_DENIED),
        ("SignatureDoesNotMatch", Reason.S3_DENIED),
        ("NoSuchKey", Reason.INVALID_SPEC),
        ("SlowDown", Reason.S3_UNAVAILABLE),
        ("RequestTimeTooSkewed", Reason.S3_UNAVAILABLE),
    ],
)
def test_s3_error_codes_map_to_reasons(monkeypatch, code, reason):
    store = s3_store()

    def refuse(**_: object) -> None:
        raise ClientError({"Error": {"Code": code}}, "GetObject")

    monkeypatch.setattr(store._client, "get_object", refuse)
    with pytest.raises(RunError) as caught:
        store.read("x")
    assert caught.value.reason == reason
    assert "spec.output.uri: s3://adapters/team-a/job/x" in caught.value.message


@pytest.mark.usefixtures("bucket")
def test_s3_conflict_is_retried(monkeypatch):
    store, attempts = s3_store(), []
    real = store._client.put_object

    def conflict_once(**arguments: object) -> object:
        attempts.append(1)
        if len(attempts) == 1:
            raise ClientError({"Error": {"Code": "ConditionalRequestConflict"}}, "PutObject")
        return real(**arguments)

    monkeypatch.setattr(store._client, "put_object", conflict_once)
    store.put("manifest.json", b"{}", if_none_match=True)
    assert (len(attempts), store.read("manifest.json")) == (2, b"{}")


@pytest.mark.usefixtures("bucket")
def test_upload_that_reads_back_different_fails(monkeypatch):
    store = s3_store()
    monkeypatch.setattr(store._client, "head_object", lambda **_: {"ContentLength": 1})
    with pytest.raises(RunError, match="reads back different") as caught:
        store.put("x", b"content")
    assert caught.value.reason == Reason.UPLOAD_FAILED


def test_unreachable_server_is_reported(monkeypatch):
    monkeypatch.setattr("qlora_trainer.storage.s3._REQUEST_ATTEMPTS", 1)
    with pytest.raises(RunError) as caught:
        s3_store(endpoint="http://127.0.0.1:9").read("x")
    assert caught.value.reason == Reason.S3_UNAVAILABLE


def test_every_role_except_trackers_has_a_store_field():
    trackers = {SecretRole.WANDB, SecretRole.MLFLOW}
    assert {field_ref.role for field_ref in (MODEL_FIELD, DATASET_FIELD, OUTPUT_FIELD)} == set(SecretRole) - trackers
