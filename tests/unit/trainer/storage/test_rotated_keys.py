"""Keys of a Secret that is changed while a run trains."""

from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from qlora_api.logs.redaction import REDACTOR
from qlora_api.names import SecretRole
from qlora_api.reasons import Reason
from qlora_api.runconfig import S3Config
from qlora_trainer.errors import RunError
from qlora_trainer.storage.credentials import Credentials, load_secrets
from qlora_trainer.storage.s3 import S3Store
from qlora_trainer.storage.store import OUTPUT_FIELD
from tests.unit.trainer.tiny import make_spec, serving


class Bucket(BaseHTTPRequestHandler):
    """A bucket that lets in one key, and keeps nothing."""

    valid = "old"
    tokens: list[str | None]

    def do_HEAD(self) -> None:
        self.tokens.append(self.headers["x-amz-security-token"])
        known = f"Credential={self.valid}/" in self.headers["Authorization"]
        self.send_response(200 if known else 403)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing."""


def write_version(folder: Path, version: str, **keys: str) -> None:
    """Update a mounted Secret as the kubelet does: it renames a link to a folder with the new version."""
    (folder / version).mkdir(parents=True)
    for name, value in keys.items():
        (folder / version / name).write_text(value)
    (folder / "..new").symlink_to(version)
    (folder / "..new").rename(folder / "..data")
    for name in keys:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(f"..data/{name}")


def mounted(mount: Path, endpoint: str) -> Credentials:
    """The credentials of the output, as a pod reads them."""
    keys = {"AWS_ACCESS_KEY_ID": "old", "AWS_SECRET_ACCESS_KEY": "old-secret", "AWS_ENDPOINT_URL": endpoint}
    write_version(mount / "output", "..1", **keys)
    spec = make_spec("hf://a/b", "s3://data/rows.jsonl", "s3://adapters", output={"secretRef": {"name": "s3"}})
    return load_secrets(spec, "ml", mount).of(SecretRole.OUTPUT)


def test_keys_that_were_rotated_in_the_secret_are_used_for_the_next_request(tmp_path: Path) -> None:
    bucket = type("Bucket", (Bucket,), {"tokens": []})
    with serving(bucket) as endpoint:
        store = S3Store("s3://adapters/team", OUTPUT_FIELD, mounted(tmp_path, endpoint), S3Config())
        assert store.exists("manifest.json")
        bucket.valid = "new"
        with pytest.raises(RunError) as denied:
            store.exists("manifest.json")
        assert denied.value.reason is Reason.S3_DENIED
        keys = {"AWS_ACCESS_KEY_ID": "new", "AWS_SECRET_ACCESS_KEY": "new-secret", "AWS_SESSION_TOKEN": "session"}
        write_version(tmp_path / "output", "..2", **keys)
        assert store.exists("manifest.json")
    assert bucket.tokens == [None, None, "session"]
    assert "new-secret" not in REDACTOR.redact_text("denied for new-secret")


def test_keys_of_a_secret_that_was_deleted_are_kept(tmp_path: Path) -> None:
    credentials = mounted(tmp_path, "http://s3")
    write_version(tmp_path / "output", "..2")
    assert credentials.reread() == credentials
