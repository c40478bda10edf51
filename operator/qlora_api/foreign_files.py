"""Opens files that others wrote: regular files only, so that no pipe or device in a folder stops its reader."""

import contextlib
import errno
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from qlora_api.untrusted_json import parse_object


class NotRegularFileError(OSError):
    """The path leads to a pipe, a socket or a device."""


class FileTooLargeError(OSError):
    """The file is larger than anything that is expected at its path."""


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading.

    Raises:
        OSError: As of `open`, and NotRegularFileError for what is neither a file nor a folder.

    """
    # A pipe without a writer blocks whoever opens it otherwise; a regular file is read as always.
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _check_regular(path, os.fstat(handle).st_mode)
    except OSError:
        os.close(handle)
        raise
    return os.fdopen(handle, "rb")


def check_regular(path: Path) -> None:
    """Raise OSError if a path, which another library is going to open, leads to no regular file."""
    _check_regular(path, path.stat().st_mode)


def _check_regular(path: Path, mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise NotRegularFileError(errno.EINVAL, "not a regular file", str(path))


def find_special(folder: Path) -> Path | None:
    """Return a pipe, socket or device below a folder that another library is going to read; None if there is none.

    What is hidden is not looked at: no library reads it, and the tools of version control keep sockets there.
    """
    folders = [str(folder)]
    while folders:
        # What cannot be read, such as a link to nothing, cannot be opened by anybody else either.
        with contextlib.suppress(OSError), os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                elif _is_special(entry):
                    return Path(entry.path)
    return None


def _is_special(entry: os.DirEntry[str]) -> bool:
    with contextlib.suppress(OSError):
        mode = entry.stat().st_mode
        return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)
    return False


def read_file(path: Path, max_bytes: int) -> bytes:
    """Return the content of a file.

    Raises:
        OSError: As of `open_regular`, and FileTooLargeError if it has more than `max_bytes` bytes.

    """
    content = read_start(path, max_bytes + 1)
    if len(content) > max_bytes:
        raise FileTooLargeError(errno.EFBIG, f"has more than {max_bytes:,} bytes", str(path))
    return content


def read_named(path: Path, count: int) -> bytes:
    """Return the first bytes of a file that a person names, who may name a pipe, such as /dev/stdin."""
    with path.open("rb") as stream:
        return stream.read(count)


def read_start(path: Path, count: int) -> bytes:
    """Return the first bytes of a file, or all if it has fewer; raises as `open_regular`."""
    with open_regular(path) as stream:
        return stream.read(count)


def read_object(path: Path, max_bytes: int) -> dict[str, Any]:
    """Return the content of a file with a JSON object.

    Raises:
        OSError: As of `open_regular`.
        InvalidJsonError: It is longer than `max_bytes`, or no object; the message is to be put after its name.

    """
    return parse_object(read_start(path, max_bytes + 1), max_bytes)
