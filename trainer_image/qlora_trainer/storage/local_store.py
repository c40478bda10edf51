"""Store in a local folder: file:// URIs, and pvc:// URIs for reading."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from qlora_api.foreign_files import NotRegularFileError, check_regular, open_regular
from qlora_api.names import CLAIM_SCHEME
from qlora_api.reasons import Reason
from qlora_trainer.errors import RunError
from qlora_trainer.storage.store import (
    Entry,
    FieldRef,
    MissingObjectError,
    ObjectExistsError,
    check_count,
    check_name,
    check_size,
    link_boundary,
    local_path,
    report_refused,
    sha256_of,
)


def files_below(folder: Path, on_error: Callable[[str, OSError], None]) -> Iterator[Path]:
    """Yield every file below a folder, however deep; links to folders are not followed.

    Args:
        folder: Where to start; without it there are no files.
        on_error: Called with each path that cannot be read, such as a folder without permission.

    """
    folders = [str(folder)] if folder.is_dir() else []
    while folders:
        parent = folders.pop()
        try:
            with os.scandir(parent) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    elif _is_file(entry, on_error):
                        yield Path(entry.path)
        except OSError as error:
            on_error(parent, error)


def _is_file(entry: os.DirEntry[str], on_error: Callable[[str, OSError], None]) -> bool:
    try:
        return entry.is_file()
    except OSError as error:  # such as a link to a name that is too long, or to a folder without permission
        on_error(entry.path, error)
        return False


def _cannot(error: OSError) -> str:
    return f"cannot be read: {error.strerror}; correct its permissions or its name"


class FileStore:
    """Store in a local folder."""

    def __init__(self, uri: str, field_ref: FieldRef) -> None:
        self.root = uri.rstrip("/")
        self.folder = local_path(uri)
        self._field_ref = field_ref
        self._boundary = link_boundary(uri, field_ref.role)

    def list(self, prefix: str = "", on_refused: Callable[[str], None] | None = None) -> tuple[Entry, ...]:
        """Return every file below a folder, sorted by path."""
        folder = self.path_of(prefix) if prefix else self.folder
        entries = []

        def refuse(path: str, error: OSError) -> None:
            where = f"{self._field_ref.field}: {path}"
            report_refused(path, RunError(Reason.S3_DENIED, f"{where} {_cannot(error)}"), on_refused)

        for file in sorted(check_count(files_below(folder, refuse), self.root, self._field_ref)):
            try:
                name = check_name(file.relative_to(self.folder).as_posix(), self.root, self._field_ref)
                entries.append(Entry(name, self.path_of(name).stat().st_size))
            except RunError as error:
                report_refused(file.name, error, on_refused)
            except OSError as error:
                refuse(str(file), error)
        return tuple(entries)

    def path_of(self, path: str) -> Path:
        """Return the local path of a file.

        Raises:
            RunError: The path is no object name, or a symbolic link in a claim or output points outside it, where the
                pod has its Secrets, for example.

        """
        file = check_name(path, self.root, self._field_ref).below(self.folder)
        self._check_inside(file)
        return file

    def _check_inside(self, file: Path) -> None:
        if self._boundary is None:
            return
        try:
            inside = file.resolve().is_relative_to(self._boundary.resolve())
        except (OSError, RuntimeError):  # a circle of links
            inside = False
        if not inside:
            container = "claim" if self.root.startswith(CLAIM_SCHEME) else "folder"
            raise RunError(
                self._field_ref.not_found,
                f"{self._field_ref.field}: {file} points outside its {container}; put the file itself there",
            )

    def fingerprint(self, entry: Entry) -> str:
        """Return the SHA-256 of the file; timestamps would change with every copy."""
        return sha256_of(self.path_of(entry.path))

    def read(self, path: str, max_bytes: int | None = None) -> bytes:
        """Return the content of a file."""
        with self._translating_errors(path), open_regular(self.path_of(path)) as stream:
            content = stream.read(-1 if max_bytes is None else max_bytes + 1)
        return check_size(content, max_bytes, f"{self.root}/{path}", self._field_ref)

    def read_start(self, path: str, count: int) -> tuple[bytes, int]:
        """Return the first bytes of a file, and its size."""
        with self._translating_errors(path), open_regular(self.path_of(path)) as stream:
            return stream.read(count), os.fstat(stream.fileno()).st_size

    def download(self, path: str, target: Path) -> None:
        """Copy a file."""
        source = self.path_of(path)
        with self._translating_errors(path):
            check_regular(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)

    def put(self, path: str, source: Path | bytes, *, if_none_match: bool = False) -> bool:
        """Write a file atomically; the conditional form is a hard link, which fails if the target exists."""
        target = self.path_of(path)
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
        file = self.path_of(path)
        with self._translating_errors(path):
            return file.is_file()

    def sha256(self, path: str) -> str:
        """Return the SHA-256 of a file."""
        with self._translating_errors(path):
            return sha256_of(self.path_of(path))

    stored_sha256 = sha256

    def delete(self, path: str) -> None:
        """Delete a file, or a link and not what it points to; a missing one is not an error."""
        file = check_name(path, self.root, self._field_ref).below(self.folder)
        self._check_inside(file.parent)
        with self._translating_errors(path), contextlib.suppress(NotADirectoryError):
            file.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _translating_errors(self, path: str) -> Iterator[None]:
        """Map errors of the file system to RunErrors that name the field."""
        where = f"{self._field_ref.field}: "
        try:
            yield
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError, NotRegularFileError) as error:
            message = f"{where}there is no {self.path_of(path)}; correct the URI"
            raise MissingObjectError(self._field_ref.not_found, message) from error
        except OSError as error:
            message = (
                f"{where}cannot access {self.path_of(path)}: {error.strerror}; correct its permissions or its name"
            )
            raise RunError(Reason.S3_DENIED, message) from error
