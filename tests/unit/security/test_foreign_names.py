"""Names that others choose never lead out of a store, a folder or a prefix: neither to read, to write nor to delete."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto import mock_aws
from pydantic import ValidationError

from qlora_api.object_names import ObjectName
from qlora_api.prepared import PinnedTask
from qlora_api.reasons import Reason
from qlora_api.report import ManifestFile
from qlora_api.runconfig import Platform, S3Config
from qlora_trainer.data.sources import local_files
from qlora_trainer.errors import RunError
from qlora_trainer.model.model_files import check_model_files
from qlora_trainer.storage.credentials import Credentials, environment_secrets
from qlora_trainer.storage.huggingface_hub import Hub
from qlora_trainer.storage.local_store import FileStore
from qlora_trainer.storage.s3 import S3Store
from qlora_trainer.storage.snapshots import SourceResolver
from qlora_trainer.storage.store import DATASET_FIELD, MODEL_FIELD, OUTPUT_FIELD, ObjectTooLargeError, Store
from tests.hub import FakeHub, Repository

HOSTILE = {
    "absolute": "/etc/passwd",
    "parent": "../thesis.txt",
    "parent-in-the-middle": "adapter/../../thesis.txt",
    "parent-at-the-end": "adapter/..",
    "double-slash": "step-000001-a1//home/u/.bashrc",
    "only-slash": "/",
    "trailing-slash": "adapter/",
    "empty": "",
    "dot": ".",
    "dot-segment": "adapter/./x",
    "nul": "adapter/x\0.json",
    "newline": "adapter/x\n.json",
    "escape": "adapter/\x1b]52;c;Y3Vyb\x07",
    "c1": "adapter/\x9b31m",
    "backslash": "adapter\\..\\..\\thesis.txt",
    "drive": "C:/Windows/x",
    "drive-relative": "c:x",
    "right-to-left-override": "adapter/\u202etxt.nosj",
    "arabic-letter-mark": "adapter/\u061cx",
    "zero-width": "adapter/\u200bx",
    "tag-character": "adapter/\U000e0041x",
    "line-separator": "adapter/\u2028x",
    "lone-surrogate": "adapter/\ud800x",
    "long-segment": "a" * 256,
    "long-segment-in-bytes": "ä" * 128,
    "long-name": "a/" * 512 + "b",
}
HONEST = (
    "adapter/adapter_model.safetensors",
    "my rows/part 1.jsonl",
    "größe/数据/données.jsonl",
    "a+b=c#d&e.jsonl",
    "date=2026-01-01/hour=12/x.parquet",
    "...",
    "..x/.hidden",
    "~/x",
    "12:30:00.jsonl",
    "%2e%2e/x",
    "👩‍💻.jsonl".replace("\u200d", ""),
    "a" * 255,
)


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_name_is_no_object_name(name: str) -> None:
    with pytest.raises(ValueError, match=r"^the name .*; rename it$") as refusal:
        ObjectName(name)
    assert str(refusal.value).isprintable()
    with pytest.raises(ValidationError):
        ManifestFile(path=name, size=1, sha256="0" * 64)


@pytest.mark.parametrize("name", HONEST)
def test_honest_name_is_an_object_name_and_stays_as_it_is(name: str, tmp_path: Path) -> None:
    assert ObjectName(name).below(tmp_path) == tmp_path / name
    file = ManifestFile(path=name, size=1, sha256="0" * 64)
    assert ManifestFile.model_validate_json(file.model_dump_json()) == file


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    with mock_aws():
        client = boto3.client("s3", region_name="us-east-1", aws_access_key_id="k", aws_secret_access_key="s")
        client.create_bucket(Bucket="data")
        yield client


def s3_store(field_ref=OUTPUT_FIELD) -> S3Store:
    return S3Store(
        "s3://data/out", field_ref, Credentials({"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}), S3Config()
    )


ACCESSES: dict[str, Callable[[Store, str, Path], object]] = {
    "read": lambda store, name, _: store.read(name),
    "download": lambda store, name, work: store.download(name, work / "copy"),
    "put": lambda store, name, _: store.put(name, b"evil"),
    "put-once": lambda store, name, _: store.put(name, b"evil", if_none_match=True),
    "exists": lambda store, name, _: store.exists(name),
    "sha256": lambda store, name, _: store.sha256(name),
    "stored-sha256": lambda store, name, _: store.stored_sha256(name),
    "delete": lambda store, name, _: store.delete(name),
}


@pytest.mark.parametrize("access", ACCESSES.values(), ids=ACCESSES.keys())
@pytest.mark.parametrize("scheme", ["file", "s3"])
@pytest.mark.usefixtures("bucket")
def test_no_access_takes_a_hostile_name(tmp_path: Path, scheme: str, access: Callable[..., object]) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    store: Store = s3_store() if scheme == "s3" else FileStore(f"file://{tmp_path}/out", OUTPUT_FIELD)
    for name in HOSTILE.values():
        with pytest.raises(RunError, match="rename it") as refusal:
            access(store, name, tmp_path)
        assert refusal.value.message.startswith("spec.output.uri: ")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["thesis.txt"]
    assert (tmp_path / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("name", [name for name in HONEST if "..." not in name])
@pytest.mark.parametrize("scheme", ["file", "s3"])
@pytest.mark.usefixtures("bucket")
def test_honest_name_is_written_listed_read_and_deleted(tmp_path: Path, scheme: str, name: str) -> None:
    store: Store = s3_store() if scheme == "s3" else FileStore(f"file://{tmp_path}/out", OUTPUT_FIELD)
    store.put(name, b"content")
    assert [entry.path for entry in store.list()] == [name]
    assert store.read(name) == b"content"
    store.download(name, ObjectName(name).below(tmp_path / "copy"))
    store.delete(name)
    assert store.list() == ()


PLANTED = ("a//b", "/abs", "x/../../y", "x/./y", "back\\slash", "c:/x", "bidi\u202e", "ctrl\x01x")


@pytest.mark.parametrize("key", PLANTED)
@pytest.mark.parametrize("ending", ["", ".jsonl", ".JSONL.GZ", ".safetensors", ".jinja"])
def test_planted_key_is_an_error_or_is_reported_and_skipped(
    bucket: Any, key: str, ending: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a file that is read, the data would be others; an image with an odd name is nobody's data."""
    bucket.put_object(Bucket="data", Key=f"out/{key}{ending}", Body=b"evil")
    bucket.put_object(Bucket="data", Key="out/good", Body=b"")
    if ending:
        with pytest.raises(RunError, match=r"spec\.dataset\.uri: an object below s3://data/out .*; rename it"):
            s3_store(DATASET_FIELD).list()
    else:
        assert [entry.path for entry in s3_store(DATASET_FIELD).list()] == ["good"]
        assert "rename it" in caplog.text
    skipped: list[str] = []
    assert [entry.path for entry in s3_store().list("", skipped.append)] == ["good"]
    assert len(skipped) == 1


@pytest.mark.parametrize("name", ["\U0001f469\u200d\U0001f4bb.png", "می‌خواهم.md", "a\u202eb"])
def test_files_with_odd_names_that_nothing_reads_are_skipped(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Models and datasets on the hub have images and notes beside their files."""
    for file in (name, "train.jsonl"):
        (tmp_path / file).write_text("{}")
    assert [entry.path for entry in FileStore(tmp_path.as_uri(), DATASET_FIELD).list()] == ["train.jsonl"]
    with FakeHub({"org/model": Repository({name: b"", "config.json": b"{}"})}) as hub:
        assert Hub(MODEL_FIELD, hub.endpoint).resolve("org/model", "main")[1] == ("config.json",)
    assert caplog.text.count("rename it") == 2


def test_link_out_of_a_claim_that_nothing_reads_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_trainer.storage.store.CLAIMS_MOUNT", str(tmp_path))
    (tmp_path / "claim").mkdir()
    (tmp_path / "secret").write_text("{}")
    (tmp_path / "claim/notes.md").symlink_to(tmp_path / "secret")
    store = FileStore("pvc://claim/", DATASET_FIELD)
    assert store.list() == ()
    (tmp_path / "claim/train.jsonl").symlink_to(tmp_path / "secret")
    with pytest.raises(RunError, match="points outside its claim"):
        store.list()


def test_key_that_is_also_a_folder_is_reported(bucket: Any, tmp_path: Path) -> None:
    for key in ("a.jsonl", "a.jsonl/b.jsonl"):
        bucket.put_object(Bucket="data", Key=f"out/{key}", Body=b"{}")
    store = s3_store(DATASET_FIELD)
    first, second = (entry.path for entry in store.list())
    store.download(first, first.below(tmp_path))
    with pytest.raises(RunError, match="is an object and a folder; rename one of them"):
        store.download(second, second.below(tmp_path))


def test_object_above_a_limit_is_not_read_into_memory(bucket: Any, tmp_path: Path) -> None:
    bucket.put_object(Bucket="data", Key="out/manifest.json", Body=b"x" * 100)
    (tmp_path / "manifest.json").write_bytes(b"x" * 100)
    for store in (s3_store(), FileStore(f"file://{tmp_path}", OUTPUT_FIELD)):
        assert len(store.read("manifest.json", 100)) == 100
        with pytest.raises(ObjectTooLargeError, match="larger than 99 bytes; delete it"):
            store.read("manifest.json", 99)


@pytest.fixture
def output(tmp_path: Path) -> FileStore:
    """Create an output next to a person's files."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.txt").write_text("mine")
    (tmp_path / "out/digest").mkdir(parents=True)
    return FileStore(f"file://{tmp_path}/out", OUTPUT_FIELD)


@pytest.mark.parametrize("access", [name for name in ACCESSES if name != "delete"])
@pytest.mark.parametrize("link", ["file", "folder", "circle"])
def test_link_out_of_an_output_is_not_followed(output: FileStore, tmp_path: Path, link: str, access: str) -> None:
    target = {"file": tmp_path / "home/thesis.txt", "folder": tmp_path / "home", "circle": tmp_path / "out/digest/x"}
    (tmp_path / "out/digest/x").symlink_to(target[link])
    name = "digest/x" if link != "folder" else "digest/x/thesis.txt"
    with pytest.raises(RunError, match="points outside its folder; put the file itself there"):
        ACCESSES[access](output, name, tmp_path)
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["thesis.txt"]
    assert (tmp_path / "home/thesis.txt").read_text() == "mine"


def test_link_in_an_output_is_deleted_and_not_what_it_points_to(output: FileStore, tmp_path: Path) -> None:
    (tmp_path / "out/digest/file").symlink_to(tmp_path / "home/thesis.txt")
    (tmp_path / "out/digest/folder").symlink_to(tmp_path / "home")
    output.delete("digest/file")
    with pytest.raises(RunError, match="points outside its folder"):
        output.delete("digest/folder/thesis.txt")
    assert (tmp_path / "home/thesis.txt").read_text() == "mine"
    assert [path.name for path in (tmp_path / "out/digest").iterdir()] == ["folder"]


def test_output_that_is_itself_a_link_is_used(output: FileStore, tmp_path: Path) -> None:
    (tmp_path / "disk").symlink_to(output.folder)
    linked = FileStore(f"file://{tmp_path}/disk", OUTPUT_FIELD)
    linked.put("a/b", b"content")
    assert output.read("a/b") == b"content"


def test_adapter_in_a_hub_cache_is_read_through_its_links(tmp_path: Path) -> None:
    repository = tmp_path / "models--team--adapter"
    (repository / "blobs").mkdir(parents=True)
    (repository / "blobs/1").write_text("{}")
    (repository / "snapshots/c0ffee").mkdir(parents=True)
    (repository / "snapshots/c0ffee/qlora.json").symlink_to("../../blobs/1")
    assert FileStore(f"file://{repository}/snapshots/c0ffee", OUTPUT_FIELD).read("qlora.json") == b"{}"


@pytest.mark.parametrize("file", ["../evil.safetensors", "a//b.json", "/etc/x.json", "bidi\u202e.json"])
def test_hostile_file_of_a_repository_is_refused(file: str) -> None:
    with FakeHub({"org/model": Repository({file: b""})}) as hub:
        with pytest.raises(RunError, match=r"spec\.model\.uri: an object below .*/org/model .*; rename it") as refusal:
            Hub(MODEL_FIELD, hub.endpoint).resolve("org/model", "main")
        assert refusal.value.reason is Reason.MODEL_NOT_FOUND


@pytest.mark.parametrize("ref", ["../../../secret", "/etc", "main", "0" * 39, "\xff", "0" * 41])
def test_ref_of_a_mirror_is_a_commit(tmp_path: Path, ref: str) -> None:
    folder = tmp_path / "mirror/models--org--tiny/refs"
    folder.mkdir(parents=True)
    (folder / "main").write_bytes(ref.encode("latin-1"))
    resolver = SourceResolver(Platform(hub_mirror=f"file://{tmp_path}/mirror"), environment_secrets())
    with pytest.raises(RunError, match=r"does not name a commit but .*; synchronize it again"):
        resolver.resolve("hf://org/tiny", "main", MODEL_FIELD)


INDEXES = {
    "absolute": {"weight_map": {"a": "/claims/other/model.safetensors"}},
    "parent": {"weight_map": {"a": "../model.safetensors"}},
    "pickle": {"weight_map": {"a": "pytorch_model.bin"}},
    "number": {"weight_map": {"a": 3}},
    "list": {"weight_map": ["model.safetensors"]},
    "none": {},
}


@pytest.mark.parametrize("index", INDEXES.values(), ids=INDEXES.keys())
@pytest.mark.parametrize("name", ["model.safetensors.index.json", "sub/other.safetensors.index.json"])
def test_shard_index_names_safetensors_of_its_folder_only(tmp_path: Path, index: object, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(json.dumps(index))
    with pytest.raises(RunError, match=r"index\.json: weight_map: .*; correct the index") as refusal:
        check_model_files(tmp_path)
    assert refusal.value.reason is Reason.UNSAFE_MODEL_FORMAT


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[" * 100_000])
def test_shard_index_that_is_no_json_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(RunError, match="correct the index"):
        check_model_files(tmp_path)


def test_honest_shard_index_is_accepted(tmp_path: Path) -> None:
    index = {"metadata": {"total_size": 1}, "weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "pytorch_model.bin"}}))
    check_model_files(tmp_path)


def test_model_that_redirects_to_another_base_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "/claims/other"}')
    with pytest.raises(RunError, match="this is an adapter and not a model"):
        check_model_files(tmp_path)


@pytest.mark.parametrize("file", ["/work/snapshots/evil.yaml", "../../evil.yaml"])
def test_task_of_the_bucket_names_a_configuration_of_the_harness(file: str) -> None:
    """A configuration's !function imports code from the file's folder."""
    with pytest.raises(ValidationError):
        PinnedTask(name="t", file=file, dataset="o/d", commit="c")


@pytest.mark.parametrize("name", ["my rows.jsonl", "größe+1.jsonl", "a#b=c.jsonl", "100%.jsonl"])
def test_local_dataset_with_an_honest_name_is_found(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    resolver = SourceResolver(Platform(), environment_secrets())
    uris = ((tmp_path / name).as_uri(), f"{tmp_path.as_uri()}/")
    assert [local_files(resolver, uri, DATASET_FIELD, tmp_path).paths for uri in uris] == [(tmp_path / name,)] * 2
