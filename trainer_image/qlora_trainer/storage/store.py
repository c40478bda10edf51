"""Interface of the stores for data and results: s3://, file://, and pvc:// for reading."""

import errno
import hashlib
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol, TypeVar
from urllib.parse import unquote

from qlora_api.foreign_files import open_regular
from qlora_api.names import CLAIM_SCHEME, CLAIMS_MOUNT, SecretRole
from qlora_api.object_names import ObjectName
from qlora_api.reasons import Reason
from qlora_api.units import MIB
from qlora_trainer.errors import RunError

_CHUNK_BYTES: Final = MIB
_READ_SUFFIXES: Final = (
    ".arrow",
    ".csv",
    ".feather",
    ".gz",
    ".jinja",
    ".json",
    ".jsonl",
    ".model",
    ".ndjson",
    ".parquet",
    ".pq",
    ".safetensors",
    ".tsv",
    ".txt",
)
"""Endings of files that are read from datasets and models; to leave one out would change what is learned."""
MAX_LISTED: Final = 100_000
"""Objects of a listing: a hundred requests to S3; a dataset or a model has hundreds of files."""
SIZE: Final = re.compile("[0-9]{1,18}")
"""Bytes of a file, as servers say them: file systems count in 64 bits."""
Item = TypeVar("Item")

log = logging.getLogger(__name__)


class ObjectExistsError(Exception):
    """The object of a conditional put already exists."""


class MissingObjectError(RunError):
    """The object does not exist; the reason is that of the field."""


class ObjectTooLargeError(RunError):
    """The object is larger than anything that is expected at its path."""


_UNAVAILABLE: Final = frozenset({Reason.S3_UNAVAILABLE, Reason.S3_DENIED})
_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ENOMEM})


def is_unavailable(error: Exception) -> bool:
    """Return whether a read failed for what says nothing about the object: the store, credentials, memory or a disk.

    The object may be intact, so that nobody may do without it: the run ends, and a further attempt reads it.
    """
    if isinstance(error, RunError):
        return error.reason in _UNAVAILABLE
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in _NO_ROOM)


@dataclass(frozen=True)
class Entry:
    """One object of a listing; `size` is in bytes."""

    path: ObjectName
    size: int
    etag: str = ""


@dataclass(frozen=True)
class FieldRef:
    """The field of the spec that a store belongs to; error messages and reasons refer to it."""

    role: SecretRole
    field: str
    missing_reason: Reason | None = None
    """Reason for missing objects, if the default of the role would refer to another field."""

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


LFS_POINTER: Final = b"version https://git-lfs"
"""What a file begins with that git-lfs has not replaced by its content (the specification of git-lfs pointers)."""
MODEL_FIELD: Final = FieldRef(SecretRole.MODEL, "spec.model.uri")
DATASET_FIELD: Final = FieldRef(SecretRole.DATASET, "spec.dataset.uri")
EVALUATION_FIELD: Final = FieldRef(SecretRole.DATASET, "spec.dataset.evaluation.uri")
OUTPUT_FIELD: Final = FieldRef(SecretRole.OUTPUT, "spec.output.uri")


class Store(Protocol):
    """A folder of objects; every path is relative to `root`, and refused if it is no ObjectName."""

    root: str

    def list(self, prefix: str = "", on_refused: Callable[[str], None] | None = None) -> tuple[Entry, ...]:
        """List the objects below a folder.

        Args:
            prefix: Folder relative to `root`, without a trailing slash; empty for all objects.
            on_refused: Called with a message for each object whose name or link points elsewhere; without it,
                such an object is an error if its ending says that it is data or part of a model, and logged if not.

        Returns:
            The entries, sorted by path.

        Raises:
            RunError: Access fails, or the name or link of an object points outside the store.

        """

    def fingerprint(self, entry: Entry) -> str:
        """Return a value that changes with the content: the ETag in S3, the SHA-256 of a file."""

    def read(self, path: str, max_bytes: int) -> bytes:
        """Return the content of an object, or raise MissingObjectError, or ObjectTooLargeError above the limit."""

    def read_start(self, path: str, count: int) -> tuple[bytes, int]:
        """Return the first `count` bytes of an object, or all if it has fewer, and its size; or MissingObjectError."""

    def download(self, path: str, target: Path) -> None:
        """Download an object to a file, or raise MissingObjectError."""

    def put(self, path: str, source: Path | bytes, *, if_none_match: bool = False) -> bool:
        """Upload an object and verify it.

        Args:
            path: Path relative to `root`.
            source: Content, or the file that has it.
            if_none_match: Do not overwrite an existing object.

        Returns:
            Whether the store computed a SHA-256 that was compared; some stores only return the one they were sent.

        Raises:
            ObjectExistsError: The object exists and `if_none_match` is set.
            RunError: Access fails, or the stored object differs from `source`.

        """

    def exists(self, path: str) -> bool:
        """Return whether the object exists."""

    def sha256(self, path: str) -> str:
        """Return the SHA-256 of an object's content as hex digits, computed here."""

    def stored_sha256(self, path: str) -> str:
        """Return the SHA-256 that the store verified on upload, without reading the content; empty if it has none."""

    def delete(self, path: str) -> None:
        """Delete an object; a missing one is not an error."""


def check_count(items: Iterable[Item], root: str, field_ref: FieldRef) -> Iterator[Item]:
    """Yield the items of a listing, or raise the field's not-found reason if there are too many."""
    for number, item in enumerate(items):
        if number == MAX_LISTED:
            raise RunError(
                field_ref.not_found,
                f"{field_ref.field}: {root} holds more than {MAX_LISTED:,} files; use a folder with fewer",
            )
        yield item


def local_path(uri: str) -> Path:
    """Return the local path of a file:// URI, or of a pvc:// URI in a pod that mounts the claim."""
    if uri.startswith(CLAIM_SCHEME):
        return Path(CLAIMS_MOUNT, uri.removeprefix(CLAIM_SCHEME))
    # A '#' or '?' that is not escaped is part of the path, too.
    return Path(f"/{unquote(uri.removeprefix('file://').partition('/')[2])}")


def claim_folder(uri: str) -> Path | None:
    """Return the mount path of the claim of a pvc:// URI; None for other URIs."""
    if not uri.startswith(CLAIM_SCHEME):
        return None
    return Path(CLAIMS_MOUNT, uri.removeprefix(CLAIM_SCHEME).partition("/")[0])


_HUB_CACHE_SNAPSHOTS: Final = "snapshots"
"""Folder in a repository of the hub's cache whose files are links to the repository's blobs."""


def link_boundary(uri: str, role: SecretRole) -> Path | None:
    """Return the folder that no symbolic link may lead out of.

    Others write claims and outputs. Models and datasets of file:// URIs are the person's own: None.
    """
    if (claim := claim_folder(uri)) is not None or role is not SecretRole.OUTPUT:
        return claim
    folder = local_path(uri.rstrip("/"))
    repositories = (parent.parent for parent in folder.parents if parent.name == _HUB_CACHE_SNAPSHOTS)
    return next((repository for repository in repositories if "--" in repository.name), folder)


def check_name(path: str, root: str, field_ref: FieldRef) -> ObjectName:
    """Return a path as an object name, or raise RunError: whoever chose it could lead out of the store."""
    try:
        return ObjectName(path)
    except ValueError as error:
        raise RunError(
            field_ref.not_found, f"{field_ref.field}: an object below {root} cannot be read or written: {error}"
        ) from error


def report_refused(path: str, error: RunError, on_refused: Callable[[str], None] | None) -> None:
    """Report an object that a listing leaves out; raise the error if the listing is of data or a model, and has to."""
    if on_refused is None and path.lower().endswith(_READ_SUFFIXES):
        raise error
    (on_refused or log.warning)(error.message)


def check_size(content: bytes, max_bytes: int | None, where: str, field_ref: FieldRef) -> bytes:
    """Return what was read with one byte more than the limit, or raise ObjectTooLargeError."""
    if max_bytes is not None and len(content) > max_bytes:
        message = f"{field_ref.field}: {where} is larger than {max_bytes} bytes; delete it"
        raise ObjectTooLargeError(field_ref.not_found, message)
    return content


def sha256_of(source: Path | bytes) -> str:
    """Return the SHA-256 of a file or of bytes, as hex digits."""
    digest = hashlib.sha256()
    if isinstance(source, bytes):
        digest.update(source)
        return digest.hexdigest()
    with open_regular(source) as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
