"""Object stores and hubs that differ from AWS and the public hub: what they lack is named, with the cure."""

import json
import ssl
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import httpx2
import pytest

from qlora_api.reasons import Reason
from qlora_api.runconfig import S3Config
from qlora_trainer.errors import RunError
from qlora_trainer.prepare import check_writable
from qlora_trainer.storage.credentials import Credentials
from qlora_trainer.storage.huggingface_hub import Hub
from qlora_trainer.storage.s3 import S3Store
from qlora_trainer.storage.snapshots import check_text_files
from qlora_trainer.storage.store import DATASET_FIELD, MODEL_FIELD, OUTPUT_FIELD, FieldRef
from tests.unit.trainer.tiny import serving, write_model

CREDENTIALS = Credentials({"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"})


class Bucket(BaseHTTPRequestHandler):
    """A bucket that stores objects in memory, and refuses some headers."""

    refused: tuple[str, str, int] = ("", "", 0)
    """Start of a header's name, and the code and the status of the answer to it."""
    ignores_conditions = False
    objects: dict[str, tuple[bytes, str]]

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        header, code, status = self.refused
        if header and any(name.lower().startswith(header) for name in self.headers):
            self.answer(status, f"<Error><Code>{code}</Code></Error>".encode())
        elif self.headers["If-None-Match"] and self.path in self.objects and not self.ignores_conditions:
            self.answer(412, b"<Error><Code>PreconditionFailed</Code></Error>")
        else:
            self.objects[self.path] = (content, self.headers.get("x-amz-meta-sha256", ""))
            self.answer(200, b"")

    def do_HEAD(self) -> None:
        content, digest = self.objects[self.path]
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("x-amz-meta-sha256", digest)
        self.end_headers()

    def do_GET(self) -> None:
        self.answer(403, b"<Error><Code>AccessDenied</Code></Error>")

    def do_DELETE(self) -> None:
        self.objects.pop(self.path, None)
        self.answer(204, b"")

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Write nothing."""


@pytest.fixture
def bucket() -> Iterator[type[Bucket]]:
    class Own(Bucket):
        objects: dict[str, tuple[bytes, str]] = {}  # noqa: RUF012 (a class per test)

    yield Own
    assert Own.objects == {}


def open_bucket(endpoint: str, field: FieldRef = OUTPUT_FIELD, **config: str) -> S3Store:
    settings = S3Config(endpoint=endpoint, addressing="path", **config)
    return S3Store("s3://adapters/x", field, CREDENTIALS, settings)


def test_store_without_conditional_writes_is_refused_before_training(bucket):
    bucket.refused = ("if-none-match", "NotImplemented", 501)
    with serving(bucket) as endpoint, pytest.raises(RunError, match=r"spec\.output\.uri: .* If-None-Match") as caught:
        list(check_writable(open_bucket(endpoint)))
    assert caught.value.reason == Reason.INVALID_SPEC


@pytest.mark.parametrize(("ignores", "said"), [(True, "ignores If-None-Match"), (False, "is writable")])
def test_store_that_ignores_conditions_is_named(bucket, ignores, said):
    bucket.ignores_conditions = ignores
    with serving(bucket) as endpoint:
        (sentence,) = check_writable(open_bucket(endpoint))
    assert said in sentence


def test_store_that_refuses_checksums_works_with_the_variable_of_boto3(bucket, monkeypatch):
    bucket.refused = ("x-amz-checksum", "InvalidArgument", 400)
    with serving(bucket) as endpoint:
        with pytest.raises(RunError, match=r"AWS_REQUEST_CHECKSUM_CALCULATION .* to when_required"):
            list(check_writable(open_bucket(endpoint)))
        assert list(check_writable(open_bucket(endpoint, checksums="when_required")))
        monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
        assert list(check_writable(open_bucket(endpoint)))


def test_refused_read_names_buckets_that_make_readers_pay(bucket):
    with serving(bucket) as endpoint, pytest.raises(RunError, match="requester pays") as caught:
        open_bucket(endpoint, DATASET_FIELD).read("rows.jsonl")
    assert caught.value.reason == Reason.S3_DENIED


@pytest.mark.parametrize(
    ("error", "said"),
    [
        pytest.param(
            httpx2.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed certificate"),
            "its certificate is not trusted .* SSL_CERT_FILE",
            id="own-ca",
        ),
        pytest.param(
            httpx2.ConnectError("[Errno -2] Name or service not known"), "Name or service not known", id="dns"
        ),
        pytest.param(httpx2.ReadTimeout(""), "ReadTimeout, no further message; check the network", id="silent"),
    ],
)
def test_failure_of_a_connection_is_named(error, said, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("qlora_trainer.storage.huggingface_hub.HfApi.model_info", fail)
    with pytest.raises(RunError, match=said) as caught:
        Hub(MODEL_FIELD, "https://hub.corp").resolve("a/b", "main")
    assert caught.value.reason == Reason.HUB_UNAVAILABLE
    assert ssl.OPENSSL_VERSION  # the text is OpenSSL's


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_small_file_that_is_a_pointer_of_git_lfs_is_named(tmp_path: Path, name: str):
    write_model(tmp_path)
    check_text_files(tmp_path, [name], MODEL_FIELD)
    (tmp_path / name).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 9\n")
    with pytest.raises(RunError, match=rf"spec\.model\.uri: {name} is a pointer of git-lfs; run `git lfs pull`"):
        check_text_files(tmp_path, [name], MODEL_FIELD)


@pytest.mark.parametrize("content", ["", "{", "[1]", json.dumps({"a": 1})[:-1]])
def test_small_file_that_is_no_json_is_named(tmp_path: Path, content: str):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(RunError, match=r"spec\.model\.uri: config\.json is no JSON object"):
        check_text_files(tmp_path, ["config.json"], MODEL_FIELD)
