"""One small interface over the places that hold data and results: s3://, file://, and pvc:// for what is read."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol
from urllib.parse import unquote, urlparse

from qlora_api.names import CLAIM_SCHEME, CLAIMS_MOUNT, SecretRole
from qlora_api.reasons import Reason
from qlora_api.units import MIB
from qlora_trainer.errors import RunError

_CHUNK_BYTES: Final = MIB


class ObjectExistsError(Exception):
    """A conditional put found somebody else's object."""


class MissingObjectError(RunError):
    """There is no such object; the reason is the one of the role that asked."""


@dataclass(frozen=True)
class Entry:
    """One object of a listing."""

    path: str
    size: int
    etag: str = ""


@dataclass(frozen=True)
class FieldRef:
    """The field of the spec that a store is opened for; messages and reasons speak of it."""

    role: SecretRole
    field: str
    missing_reason: Reason | None = None
    """The reason for what is not there, where the role's own would name another field."""

    @property
    def not_found(self) -> Reason:
        """Return the reason for a missing object or bucket."""
        return (
            self.missing_reason
            or {
                SecretRole.MODEL: Reason.MODEL_NOT_FOUND,
                SecretRole.DATASET: Reason.DATASET_NOT_FOUND,
                SecretRole.OUTPUT: Reason.INVALID_SPEC,
            }[self.role]
        )


MODEL_FIELD: Final = FieldRef(SecretRole.MODEL, "spec.model.uri")
DATASET_FIELD: Final = FieldRef(SecretRole.DATASET, "spec.dataset.uri")
EVALUATION_FIELD: Final = FieldRef(SecretRole.DATASET, "spec.dataset.evaluation.uri")
OUTPUT_FIELD: Final = FieldRef(SecretRole.OUTPUT, "spec.output.uri")


class Store(Protocol):
    """A folder of objects; every path is relative to `root`."""

    root: str

    def list(self, prefix: str = "") -> tuple[Entry, ...]:
        """Return every object under a folder, in order of its path."""

    def fingerprint(self, entry: Entry) -> str:
        """Return what changes when the content changes: S3's ETag, or the SHA-256 of a file."""

    def read(self, path: str) -> bytes:
        """Return an object, or raise MissingObjectError."""

    def download(self, path: str, target: Path) -> None:
        """Copy an object into a file, or raise MissingObjectError."""

    def put(self, path: str, source: Path | bytes, *, if_none_match: bool = False) -> bool:
        """Write an object and verify it; with if_none_match raise AlreadyThereError when there is one.

        Return whether the store said what SHA-256 it has; some can only repeat what they were told.
        """

    def exists(self, path: str) -> bool:
        """Return whether there is such an object."""

    def sha256(self, path: str) -> str:
        """Return the SHA-256 that an object was written with, empty where the server kept none."""

    def delete(self, path: str) -> None:
        """Remove an object; a missing one is fine."""


def split_uri(uri: str) -> tuple[str, str]:
    """Split the URI of one object into its folder and its name."""
    folder, _, name = uri.rstrip("/").rpartition("/")
    return folder, name


def local_path(uri: str) -> Path:
    """Return the path of a file:// URI, or of a pvc:// URI in the pod that mounts its claim."""
    if uri.startswith(CLAIM_SCHEME):
        return Path(CLAIMS_MOUNT, uri.removeprefix(CLAIM_SCHEME))
    return Path(unquote(urlparse(uri).path))


def claim_folder(uri: str) -> Path | None:
    """Return where the claim of a pvc:// URI is mounted."""
    if not uri.startswith(CLAIM_SCHEME):
        return None
    return Path(CLAIMS_MOUNT, uri.removeprefix(CLAIM_SCHEME).partition("/")[0])


def escapes_root(path: str) -> bool:
    """Whether a name, which anybody who writes to a bucket may choose, leads out of the folder it is copied to."""
    return path.startswith("/") or ".." in path.split("/")


def sha256_of(source: Path | bytes) -> str:
    """Return the SHA-256 of a file or of bytes, as hex digits."""
    digest = hashlib.sha256()
    if isinstance(source, bytes):
        digest.update(source)
        return digest.hexdigest()
    with source.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
