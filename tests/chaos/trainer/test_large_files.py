"""Multipart uploads, and truncated downloads, with a real S3 server."""

from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from qlora_api.runconfig import S3Config
from qlora_trainer.errors import RunError
from qlora_trainer.storage import s3, s3_multipart
from qlora_trainer.storage.credentials import Credentials
from qlora_trainer.storage.s3 import S3Store
from qlora_trainer.storage.store import OUTPUT_FIELD, ObjectExistsError
from tests.cluster.services.s3 import S3
from tests.unit.trainer.tiny import serving

PART_BYTES = 5 * 1024**2
"""Minimum part size of S3."""


@pytest.fixture
def store(s3: S3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> S3Store:
    """A store that uses multipart uploads above one part."""
    monkeypatch.setattr("qlora_trainer.storage.s3.SINGLE_PUT_BYTES", PART_BYTES)
    monkeypatch.setattr(s3_multipart, "_PART_BYTES", PART_BYTES)
    bucket = s3.make_bucket(tmp_path.name.replace("_", "-"))
    return S3Store(f"s3://{bucket}/result", OUTPUT_FIELD, Credentials(s3.environment()), S3Config())


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A file of three parts."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(range(251)) * (2 * PART_BYTES // 251 + 1000))
    return path


def pending_uploads(store: S3Store) -> list[str]:
    found = store._client.list_multipart_uploads(Bucket=store._bucket)
    return [upload["Key"] for upload in found.get("Uploads", ())]


def test_large_file_is_uploaded_in_parts_and_downloads_intact(store: S3Store, large: Path, tmp_path: Path) -> None:
    store.put("model.safetensors", large, if_none_match=True)
    etag = store.list()[0].etag
    assert etag.endswith("-3")
    store.download("model.safetensors", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == large.read_bytes()
    assert pending_uploads(store) == []


def test_existing_object_is_not_overwritten_and_no_parts_remain(store: S3Store, large: Path) -> None:
    store.put("model.safetensors", b"another object")
    with pytest.raises(ObjectExistsError):
        store.put("model.safetensors", large, if_none_match=True)
    assert store.read("model.safetensors") == b"another object"
    assert pending_uploads(store) == []


@pytest.mark.parametrize("size", [0, 5, 100, 1000])
def test_start_of_an_object_is_read_with_its_size(store: S3Store, size: int) -> None:
    store.put("model.safetensors", bytes(size))
    assert store.read_start("model.safetensors", 100) == (bytes(min(size, 100)), size)


class TruncatingHandler(BaseHTTPRequestHandler):
    """Announces ten bytes, and sends only four in the first `truncations` responses."""

    truncations = 0

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "10")
        self.end_headers()
        truncated = type(self).truncations > 0
        type(self).truncations -= 1
        self.wfile.write(b"0123" if truncated else b"0123456789")

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@pytest.mark.parametrize("truncations", [s3._READ_ATTEMPTS - 1, s3._READ_ATTEMPTS])
def test_truncated_download_is_retried(truncations: int) -> None:
    server = type("Server", (TruncatingHandler,), {"truncations": truncations})
    with serving(server) as address:
        keys = Credentials({"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_ENDPOINT_URL": address})
        store = S3Store("s3://adapters/result", OUTPUT_FIELD, keys, S3Config())
        if truncations < s3._READ_ATTEMPTS:
            assert store.read("manifest.json") == b"0123456789"
        else:
            with pytest.raises(RunError, match="check the object store"):
                store.read("manifest.json")
