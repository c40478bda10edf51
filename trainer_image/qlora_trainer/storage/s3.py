"""Store for s3:// URIs: uploads with checksums, verification after upload, and exceptions mapped to reasons."""

import base64
import contextlib
import hashlib
import io
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Final

from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError
from s3transfer.utils import S3_RETRYABLE_DOWNLOAD_ERRORS

from qlora_api.names import SecretRole
from qlora_api.reasons import Reason
from qlora_api.runconfig import S3Config
from qlora_api.units import MIB
from qlora_trainer.errors import RunError
from qlora_trainer.runtime.liveness import LIVENESS
from qlora_trainer.runtime.metrics import METER
from qlora_trainer.storage.credentials import Credentials
from qlora_trainer.storage.s3_keys import make_session
from qlora_trainer.storage.s3_multipart import SINGLE_PUT_BYTES, upload_in_parts
from qlora_trainer.storage.store import (
    SIZE,
    Entry,
    FieldRef,
    MissingObjectError,
    ObjectExistsError,
    check_count,
    check_name,
    check_size,
    report_refused,
    sha256_of,
)

_DENIED: Final = {"403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"}
_MISSING: Final = {"404", "NoSuchKey", "NoSuchBucket", "NotFound"}
_EMPTY: Final = {"416", "InvalidRange"}
"""The answer to a request for the first bytes of an object without any."""
_NOT_IMPLEMENTED: Final = {"NotImplemented", "501"}
_REFUSES_HEADERS: Final = {"InvalidArgument", "InvalidRequest", "NotImplemented", "MalformedTrailerError", "400", "501"}
"""Codes of servers that do not know the headers of checksums."""
_CHECKSUM_HINT: Final = (
    ", or, if it refuses checksum headers, set platform.s3.checksums of the chart, or AWS_REQUEST_CHECKSUM_CALCULATION "
    "for 'qlora run', to when_required"
)
_REQUESTER_PAYS: Final = "; if the bucket makes its readers pay (requester pays), copy the objects into another one"
_SKEWED: Final = "RequestTimeTooSkewed"
_LONGEST_SKEW: Final = timedelta(minutes=15)
"""Maximum clock skew between signature and server (Amazon S3, Signature Version 4)."""
_CONFLICT_ATTEMPTS: Final = 5
"""Attempts of a conditional put that gets a 409, which S3 returns while another one for the key is in progress."""
_CONFLICT_WAIT_SECONDS: Final = 0.5
_REQUEST_ATTEMPTS: Final = 8
"""Attempts per request. A run makes hundreds of requests: if 30 % fail, four attempts lose one in a hundred, eight one
in 10,000. With boto3's back-off, an unreachable endpoint fails after about a minute."""
_READ_ATTEMPTS: Final = _REQUEST_ATTEMPTS
"""Attempts to read an object whose content breaks off, which boto3 counts apart from those of a request."""
_DIGEST_METADATA: Final = "sha256"
"""User metadata with the SHA-256, for servers that store no checksums."""


def make_client(credentials: Credentials, config: S3Config) -> Any:
    """Return a boto3 client; the Secret takes precedence over the platform's settings, and those over boto3's own."""
    session = make_session(credentials)
    endpoint = credentials.get("AWS_ENDPOINT_URL") or config.endpoint
    return session.client(
        "s3",
        endpoint_url=endpoint,
        region_name=credentials.get("AWS_REGION") or config.region or session.region_name or "us-east-1",
        config=Config(
            s3={"addressing_style": config.addressing},
            retries={"mode": "standard", "total_max_attempts": _REQUEST_ATTEMPTS},
            connect_timeout=5,
            read_timeout=60,
            **_checksum_settings(config),
        ),
    )


def _checksum_settings(config: S3Config) -> dict[str, Any]:
    """Return the settings for servers that reject checksums; by default boto3's own apply, such as its variables."""
    if config.checksums == "when_supported":
        return {}
    return {"request_checksum_calculation": config.checksums, "response_checksum_validation": config.checksums}


class S3Store:
    """Store below a prefix of a bucket."""

    def __init__(self, uri: str, field_ref: FieldRef, credentials: Credentials, config: S3Config) -> None:
        self.root = uri.rstrip("/")
        self._bucket, _, prefix = self.root.removeprefix("s3://").partition("/")
        self._prefix = f"{prefix}/" if prefix else ""
        self._field_ref = field_ref
        with self._translating_errors(""):
            self._client = make_client(credentials, config)
        self._sends_checksums = self._client.meta.config.request_checksum_calculation == "when_supported"

    def list(self, prefix: str = "", on_refused: Callable[[str], None] | None = None) -> tuple[Entry, ...]:
        """Return every object below a folder, sorted by path."""
        folder = f"{self._key(prefix)}/" if prefix else self._prefix
        with self._translating_errors(prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=folder)
            contents = (found for page in pages for found in page.get("Contents", ()))
            objects = tuple(check_count(contents, self.root, self._field_ref))
        entries = []
        for found in objects:
            if found["Key"].endswith("/"):
                continue
            try:
                name = check_name(found["Key"].removeprefix(self._prefix), self.root, self._field_ref)
            except RunError as error:
                report_refused(found["Key"], error, on_refused)
            else:
                entries.append(Entry(name, found["Size"], found["ETag"].strip('"')))
        return tuple(sorted(entries, key=lambda entry: entry.path))

    def fingerprint(self, entry: Entry) -> str:
        """Return the ETag from the listing."""
        return entry.etag

    def read(self, path: str, max_bytes: int | None = None) -> bytes:
        """Return the content of an object."""
        limit = None if max_bytes is None else max_bytes + 1
        content: bytes = self._retried(path, lambda body: body.read(limit))
        return check_size(content, max_bytes, f"{self.root}/{path}", self._field_ref)

    def _retried(self, path: str, consume: Callable[[Any], Any]) -> Any:
        """Return what a function makes of an object's content, which may break off."""
        with self._translating_errors(path):
            for _ in range(_READ_ATTEMPTS - 1):
                with contextlib.suppress(*S3_RETRYABLE_DOWNLOAD_ERRORS):
                    return consume(self._client.get_object(**self._target(path))["Body"])
            return consume(self._client.get_object(**self._target(path))["Body"])

    def read_start(self, path: str, count: int) -> tuple[bytes, int]:
        """Return the first bytes of an object, and its size."""
        with self._translating_errors(path):
            try:
                found = self._client.get_object(**self._target(path), Range=f"bytes=0-{count - 1}")
            except ClientError as error:
                if _code(error) in _EMPTY:
                    return b"", 0
                raise
            with found["Body"] as body:
                size = found.get("ContentRange", "").rpartition("/")[2] or str(found["ContentLength"])
                if not SIZE.fullmatch(size):
                    raise RunError(
                        Reason.S3_UNAVAILABLE,
                        f"{self._field_ref.field}: {self.root}/{path}: the store does not say how long it is; use "
                        "one that answers requests for a range",
                    )
                return body.read(count), int(size)

    def download(self, path: str, target: Path) -> None:
        """Download an object to a file."""
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with self._translating_errors(path):
                client, key = self._client, self._key(path)
                settings = TransferConfig(num_download_attempts=_READ_ATTEMPTS)
                client.download_file(
                    self._bucket, key, str(target), Callback=lambda _: LIVENESS.tick(), Config=settings
                )
        except (FileExistsError, IsADirectoryError, NotADirectoryError) as error:
            message = f"{self._field_ref.field}: {self.root}/{path} is an object and a folder; rename one of them"
            raise RunError(self._field_ref.not_found, message) from error

    def put(self, path: str, source: Path | bytes, *, if_none_match: bool = False) -> bool:
        """Upload with a SHA-256 checksum, then verify size and checksum.

        Raises:
            RunError: UPLOAD_FAILED if they differ; S3_UNAVAILABLE or S3_DENIED if the upload fails.
            ObjectExistsError: The object exists and `if_none_match` is set.

        """
        digest = sha256_of(source)
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        with self._translating_errors(path), METER.upload(size):
            self._upload(path, source, digest, if_none_match)
            return self._verify(path, size, digest)

    def _upload(self, path: str, source: Path | bytes, digest: str, if_none_match: bool) -> None:
        condition: dict[str, Any] = {"IfNoneMatch": "*"} if if_none_match else {}
        for attempt in range(1, _CONFLICT_ATTEMPTS + 1):
            try:
                self._send(path, source, digest, condition)
            except ClientError as error:
                if _code(error) in {"412", "PreconditionFailed"}:
                    raise ObjectExistsError(path) from error
                if condition and _code(error) in _NOT_IMPLEMENTED:
                    raise RunError(
                        Reason.INVALID_SPEC,
                        f"{self._field_ref.field}: the object store of {self.root} has no conditional writes "
                        f"({_code(error)} to If-None-Match), which keep runs from replacing each other's results; use "
                        "a store that has them",
                    ) from error
                if _code(error) not in {"409", "ConditionalRequestConflict"} or attempt == _CONFLICT_ATTEMPTS:
                    raise
                time.sleep(_CONFLICT_WAIT_SECONDS * attempt)
            else:
                return

    def _send(self, path: str, source: Path | bytes, digest: str, condition: dict[str, Any]) -> None:
        target, metadata = self._target(path), {"Metadata": {_DIGEST_METADATA: digest}}
        if isinstance(source, Path) and source.stat().st_size > SINGLE_PUT_BYTES:
            checksum = {"ChecksumAlgorithm": "SHA256"} if self._sends_checksums else {}
            upload_in_parts(self._client, source, target, start=metadata | checksum, end=condition)
            return
        checksum = {"ChecksumSHA256": _base64_of(digest)} if self._sends_checksums else {}
        with _opened(source) as body:
            self._client.put_object(**target, **metadata, **checksum, **condition, Body=body)

    def _verify(self, path: str, size: int, digest: str) -> bool:
        """Compare the stored object with what was sent; return whether the store reports a SHA-256 of the content."""
        mode = {"ChecksumMode": "ENABLED"} if self._sends_checksums else {}
        head = self._client.head_object(**self._target(path), **mode)
        checksum = head.get("ChecksumSHA256", "")
        # After a multipart upload S3 has the checksum of the parts' checksums ("…-3"); it has verified each part.
        stored = checksum if checksum and "-" not in checksum else _base64_of(digest)
        recorded = head.get("Metadata", {}).get(_DIGEST_METADATA, digest)
        if (head["ContentLength"], stored, recorded) != (size, _base64_of(digest), digest):
            raise RunError(
                Reason.UPLOAD_FAILED,
                f"{self._field_ref.field}: {self.root}/{path} reads back different from what was sent "
                f"({head['ContentLength']} of {size} bytes); check the object store",
            )
        return bool(checksum)

    def exists(self, path: str) -> bool:
        """Return whether the object exists."""
        try:
            with self._translating_errors(path):
                self._client.head_object(**self._target(path))
        except MissingObjectError:
            return False
        return True

    def sha256(self, path: str) -> str:
        """Return the SHA-256 of the content that is read: its metadata, and in some servers its checksum, may lie."""
        digest: str = self._retried(path, _sha256_of_body)
        return digest

    def stored_sha256(self, path: str) -> str:
        """Return the checksum of an object that was uploaded in one request; empty for others."""
        if not self._sends_checksums:
            return ""
        with self._translating_errors(path):
            head = self._client.head_object(**self._target(path), ChecksumMode="ENABLED")
        checksum = str(head.get("ChecksumSHA256", ""))
        return "" if "-" in checksum else base64.b64decode(checksum).hex()

    def delete(self, path: str) -> None:
        """Delete an object; a missing one is not an error."""
        with self._translating_errors(path):
            self._client.delete_object(**self._target(path))

    def _target(self, path: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._key(path)}

    def _key(self, path: str) -> str:
        """Return the key of a name; every request gets its key here."""
        return f"{self._prefix}{check_name(path, self.root, self._field_ref)}"

    @contextlib.contextmanager
    def _translating_errors(self, path: str) -> Iterator[None]:
        """Map boto3's exceptions to RunErrors that name the field."""
        where = f"{self._field_ref.field}: {self.root}/{path}".rstrip("/")
        try:
            yield
        except ClientError as error:
            raise self._to_run_error(where, error) from error
        except (NoCredentialsError, PartialCredentialsError) as error:
            raise RunError(
                Reason.S3_DENIED,
                f"{where}: there are no credentials; name a Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY "
                f"in spec.{self._field_ref.role}.secretRef",
            ) from error
        except BotoCoreError as error:
            raise RunError(
                Reason.S3_UNAVAILABLE, f"{where}: {error}; check the object store's endpoint and the network"
            ) from error

    def _to_run_error(self, where: str, error: ClientError) -> RunError:
        code = _code(error)
        if code == "NoSuchBucket":
            message = f"{where}: bucket '{self._bucket}' does not exist; create it or correct the URI"
            is_output = self._field_ref.role is SecretRole.OUTPUT
            return MissingObjectError(Reason.OUTPUT_NOT_FOUND if is_output else self._field_ref.not_found, message)
        if code in _MISSING:
            return MissingObjectError(self._field_ref.not_found, f"{where}: there is no such object; correct the URI")
        if code == _SKEWED or (code in _DENIED and _skew(error) > _LONGEST_SKEW):
            return RunError(
                Reason.S3_UNAVAILABLE,
                f"{where}: {error.operation_name} is refused because the clock of this node is more than 15 minutes "
                "off the object store's; set the node's clock",
            )
        if code in _DENIED:
            return RunError(
                Reason.S3_DENIED,
                f"{where}: {error.operation_name} is refused ({code}); grant the credentials access to this prefix"
                f"{'' if self._field_ref.role is SecretRole.OUTPUT else _REQUESTER_PAYS}",
            )
        hint = _CHECKSUM_HINT if self._sends_checksums and code in _REFUSES_HEADERS else ""
        return RunError(
            Reason.S3_UNAVAILABLE, f"{where}: {error.operation_name} fails with {code}; check the object store{hint}"
        )


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", "unknown"))


def _skew(error: ClientError) -> timedelta:
    """Return the clock skew from the Date header: the response to a HEAD request has no body with an error code."""
    date = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date", "")
    try:
        return abs(datetime.now(UTC) - parsedate_to_datetime(date))
    except (TypeError, ValueError):
        return timedelta(0)


def _sha256_of_body(body: Any) -> str:
    digest = hashlib.sha256()
    for chunk in body.iter_chunks(MIB):
        digest.update(chunk)
        LIVENESS.tick()
    return digest.hexdigest()


def _base64_of(digest: str) -> str:
    return base64.b64encode(bytes.fromhex(digest)).decode()


class _LivenessFile(io.FileIO):
    """File that reports liveness for every chunk that is sent."""

    def read(self, size: int | None = -1, /) -> bytes:
        """Read the next chunk."""
        LIVENESS.tick()
        return super().read(-1 if size is None else size)


@contextlib.contextmanager
def _opened(source: Path | bytes) -> Iterator[Any]:
    if isinstance(source, bytes):
        yield source
        return
    with _LivenessFile(source) as stream:
        yield stream
