"""Store in a local folder: file:// URIs, and pvc:// URIs for reading."""

import os
import shutil
import tempfile
from pathlib import Path

from qlora_api.reasons import Reason
from qlora_trainer.errors import RunError
from qlora_trainer.storage.store import (
    Entry,
    FieldRef,
    MissingObjectError,
    ObjectExistsError,
    check_count,
    claim_folder,
    local_path,
    sha256_of,
)


class FileStore:
    """Store in a local folder."""

    def __init__(self, uri: str, field_ref: FieldRef) -> None:
        self.root = uri.rstrip("/")
        self.folder = local_path(uri)
        self._field_ref = field_ref
        self._claim = claim_folder(uri)

    def list(self, prefix: str = "") -> tuple[Entry, ...]:
        """Return every file below a folder, sorted by path."""
        found = (path for path in (self.folder / prefix).rglob("*") if path.is_file())
        files = sorted(check_count(found, self.root, self._field_ref))
        names = [path.relative_to(self.folder).as_posix() for path in files]
        return tuple(Entry(name, self.path_of(name).stat().st_size) for name in names)

    def path_of(self, path: str) -> Path:
        """Return the local path of a file.

        Raises:
            RunError: A symbolic link in a claim points outside it, where the pod has its Secrets, for example.

        """
        file = self.folder / path
        if self._claim is not None and not file.resolve().is_relative_to(self._claim.resolve()):
            raise RunError(
                self._field_ref.not_found,
                f"{self._field_ref.field}: {file} points outside its claim; put the file itself there",
            )
        return file

    def fingerprint(self, entry: Entry) -> str:
        """Return the SHA-256 of the file; timestamps would change with every copy."""
        return sha256_of(self.path_of(entry.path))

    def read(self, path: str) -> bytes:
        """Return the content of a file."""
        try:
            return self.path_of(path).read_bytes()
        except FileNotFoundError as error:
            raise self._missing(path) from error

    def read_start(self, path: str, count: int) -> tuple[bytes, int]:
        """Return the first bytes of a file, and its size."""
        try:
            with self.path_of(path).open("rb") as stream:
                return stream.read(count), os.fstat(stream.fileno()).st_size
        except FileNotFoundError as error:
            raise self._missing(path) from error

    def download(self, path: str, target: Path) -> None:
        """Copy a file."""
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(self.path_of(path), target)
        except FileNotFoundError as error:
            raise self._missing(path) from error

    def put(self, path: str, source: Path | bytes, *, if_none_match: bool = False) -> bool:
        """Write a file atomically; the conditional form is a hard link, which fails if the target exists."""
        target = self.folder / path
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = self._write_temporary(target, source)
        except OSError as error:
            raise RunError(
                Reason.S3_DENIED,
                f"{self._field_ref.field}: cannot write {target}: {error.strerror}; choose another folder",
            ) from error
        confirmed = sha256_of(temporary) == sha256_of(source)
        try:
            if if_none_match:
                os.link(temporary, target)
            else:
                temporary.replace(target)
        except FileExistsError as error:
            raise ObjectExistsError(path) from error
        except OSError as error:
            raise RunError(
                Reason.S3_DENIED,
                f"{self._field_ref.field}: cannot create {target}: {error.strerror}; choose a folder on "
                "a file system with hard links",
            ) from error
        finally:
            temporary.unlink(missing_ok=True)
        return confirmed

    @staticmethod
    def _write_temporary(target: Path, source: Path | bytes) -> Path:
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
        """Return whether the file exists."""
        return (self.folder / path).is_file()

    def sha256(self, path: str) -> str:
        """Return the SHA-256 of a file."""
        return sha256_of(self.folder / path)

    def delete(self, path: str) -> None:
        """Delete a file; a missing one is not an error."""
        (self.folder / path).unlink(missing_ok=True)

    def _missing(self, path: str) -> MissingObjectError:
        return MissingObjectError(
            self._field_ref.not_found, f"{self._field_ref.field}: there is no {self.folder / path}; correct the URI"
        )
