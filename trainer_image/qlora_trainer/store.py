"""One small interface over the places that hold data and results: s3://, file://, and pvc:// for what is read."""

import hashlib
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol
from urllib.parse import unquote, urlparse

from qlora_api.names import CLAIM_SCHEME, CLAIMS_MOUNT, Reason, SecretRole
from qlora_api.runconfig import S3Config
from qlora_api.units import MIB
from qlora_trainer.errors import RunError
from qlora_trainer.secrets import Secrets

_CHUNK_BYTES: Final = MIB


class AlreadyThereError(Exception):
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
class Owner:
    """The field of the spec that a store is opened for; messages and reasons speak of it."""

    role: SecretRole
    field: str
    missing: Reason | None = None
    """The reason for what is not there, where the role's own would name another field."""

    @property
    def not_found(self) -> Reason:
        """Return the reason for a missing object or bucket."""
        return (
            self.missing
            or {
                SecretRole.MODEL: Reason.MODEL_NOT_FOUND,
                SecretRole.DATASET: Reason.DATASET_NOT_FOUND,
                SecretRole.OUTPUT: Reason.INVALID_SPEC,
            }[self.role]
        )


MODEL: Final = Owner(SecretRole.MODEL, "spec.model.uri")
DATASET: Final = Owner(SecretRole.DATASET, "spec.dataset.uri")
HELD_OUT: Final = Owner(SecretRole.DATASET, "spec.dataset.evaluation.uri")
OUTPUT: Final = Owner(SecretRole.OUTPUT, "spec.output.uri")


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


def open_store(uri: str, owner: Owner, secrets: Secrets, s3: S3Config) -> Store:
    """Return the store behind a URI, with the credentials of its owner."""
    if uri.startswith(("file://", CLAIM_SCHEME)):
        return FileStore(uri, owner)
    from qlora_trainer.s3 import S3Store  # noqa: PLC0415 (boto3 takes a second to import)

    return S3Store(uri, owner, secrets.of(owner.role), s3)


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


def leads_out(path: str) -> bool:
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


class FileStore:
    """A folder of this computer."""

    def __init__(self, uri: str, owner: Owner) -> None:
        self.root = uri.rstrip("/")
        self.folder = local_path(uri)
        self._owner = owner
        self._claim = claim_folder(uri)

    def list(self, prefix: str = "") -> tuple[Entry, ...]:
        """Return every file under a folder, in order of its path."""
        files = sorted(path for path in (self.folder / prefix).rglob("*") if path.is_file())
        names = [path.relative_to(self.folder).as_posix() for path in files]
        return tuple(Entry(name, self.place(name).stat().st_size) for name in names)

    def place(self, path: str) -> Path:
        """Return where a file is; a link in a claim must not lead to what else the pod has, such as its Secrets."""
        place = self.folder / path
        if self._claim is not None and not place.resolve().is_relative_to(self._claim.resolve()):
            raise RunError(
                self._owner.not_found, f"{self._owner.field}: {place} leads out of its claim; put the file itself there"
            )
        return place

    def fingerprint(self, entry: Entry) -> str:
        """Return the file's SHA-256; its times change with every copy."""
        return sha256_of(self.place(entry.path))

    def read(self, path: str) -> bytes:
        """Return a file's content."""
        try:
            return self.place(path).read_bytes()
        except FileNotFoundError as error:
            raise self._missing(path) from error

    def download(self, path: str, target: Path) -> None:
        """Copy a file."""
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(self.place(path), target)
        except FileNotFoundError as error:
            raise self._missing(path) from error

    def put(self, path: str, source: Path | bytes, *, if_none_match: bool = False) -> bool:
        """Write a file atomically; a hard link is the conditional form, because it fails where a file exists."""
        target = self.folder / path
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = self._write_beside(target, source)
        except OSError as error:
            raise RunError(
                Reason.S3_DENIED, f"{self._owner.field}: cannot write {target}: {error.strerror}; choose another folder"
            ) from error
        confirmed = sha256_of(temporary) == sha256_of(source)
        try:
            if if_none_match:
                os.link(temporary, target)
            else:
                temporary.replace(target)
        except FileExistsError as error:
            raise AlreadyThereError(path) from error
        except OSError as error:
            raise RunError(
                Reason.S3_DENIED,
                f"{self._owner.field}: cannot put {target} in place: {error.strerror}; choose a folder on "
                "a file system with hard links",
            ) from error
        finally:
            temporary.unlink(missing_ok=True)
        return confirmed

    @staticmethod
    def _write_beside(target: Path, source: Path | bytes) -> Path:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=".part-")
        with os.fdopen(handle, "wb") as stream:
            if isinstance(source, bytes):
                stream.write(source)
            else:
                with source.open("rb") as original:
                    shutil.copyfileobj(original, stream)
            stream.flush()
            os.fsync(stream.fileno())
        return Path(name)

    def exists(self, path: str) -> bool:
        """Return whether there is such a file."""
        return (self.folder / path).is_file()

    def sha256(self, path: str) -> str:
        """Return the SHA-256 of a file."""
        return sha256_of(self.folder / path)

    def delete(self, path: str) -> None:
        """Remove a file."""
        (self.folder / path).unlink(missing_ok=True)

    def _missing(self, path: str) -> MissingObjectError:
        return MissingObjectError(
            self._owner.not_found, f"{self._owner.field}: there is no {self.folder / path}; correct the URI"
        )
