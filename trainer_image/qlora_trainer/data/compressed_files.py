"""Opens data files as bytes: decompresses what is compressed, whatever its name, and names what is no data."""

import contextlib
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Final, cast

from qlora_api.foreign_files import open_regular, read_start
from qlora_api.units import MIB
from qlora_trainer.storage.store import LFS_POINTER

MAX_COMPRESSION_RATIO: Final = 200
"""Decompressed bytes per byte of a compressed file. Text has 3 to 20; deflate's maximum is 1,032, zstd's is higher."""
MIN_DECOMPRESSED_BYTES: Final = 64 * MIB
"""Size that a compressed file may have whatever its ratio: seconds of reading, even if every byte is a line."""
COMPRESSED_SUFFIXES: Final = (".gz", ".zst", ".zstd")
_CHUNK_BYTES: Final = 1 << 18
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_FOREIGN: Final = (
    (b"\xff\xfe", "is UTF-16; save it as UTF-8"),
    (b"\xfe\xff", "is UTF-16; save it as UTF-8"),
    (LFS_POINTER, "is a pointer of git-lfs, and not the file; run 'git lfs pull', and copy it again"),
    (b"PAR1", "is a Parquet file; name it .parquet"),
    (b"ARROW1", "is an Arrow file; name it .arrow"),
    (b"PK\x03\x04", "is a zip archive or an Excel file; extract it, or save it as CSV"),
    (b"BZh", "is compressed by bzip2; compress it by gzip or zstd"),
    (b"\xfd7zXZ", "is compressed by xz; compress it by gzip or zstd"),
    (b"<!DOCTYPE", "is an HTML page, such as that of a login; download the file itself"),
    (b"<!doctype", "is an HTML page, such as that of a login; download the file itself"),
    (b"<html", "is an HTML page, such as that of a login; download the file itself"),
)
"""What a file that is no text begins with, and what to do about it."""
_START_BYTES: Final = 64


class FileError(ValueError):
    """A file cannot be read, at all or beyond a row; the message says why and how to fix it."""


def check_content(start: bytes, own: bytes = b"") -> None:
    """Raise FileError if a file begins as something else, `own` being what it may begin with."""
    for mark, message in _FOREIGN:
        if start.startswith(mark) and mark != own:
            raise FileError(message)


@contextlib.contextmanager
def open_bytes(path: Path) -> Iterator[IO[bytes]]:
    """Open a text file as bytes, decompressed if its content or its name says that it is compressed."""
    start = read_start(path, _START_BYTES)
    name = path.name.lower()
    if start.startswith(_ZSTD) or name.endswith(COMPRESSED_SUFFIXES[1:]):
        opened: IO[Any] | io.BufferedReader = io.BufferedReader(_Decompressed(path, _Zstd(path)), _CHUNK_BYTES)
    elif start.startswith(_GZIP) or name.endswith(COMPRESSED_SUFFIXES[0]):
        opened = io.BufferedReader(_Decompressed(path, gzip.GzipFile(path)), _CHUNK_BYTES)
    else:
        opened = open_regular(path)
    try:
        with opened as stream:
            check_content(cast("io.BufferedReader", stream).peek(_START_BYTES)[:_START_BYTES])
            yield cast("IO[bytes]", stream)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise FileError(f"is an incomplete or invalid gzip file ({error}); compress it again") from error


class _Zstd:
    """Decompressed content of a zstd file, by Arrow, which has the codec."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa  # noqa: PLC0415 (slow to import)

        self._errors = (pa.ArrowException, OSError)
        self._stream = pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")

    def readinto(self, buffer: Any) -> int:
        try:
            content = self._stream.read(len(buffer))
        except self._errors as error:
            raise FileError(f"is an incomplete or invalid zstd file ({error}); compress it again") from error
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        self._stream.close()


class _Decompressed(io.RawIOBase):
    """Content of a compressed file, up to the maximum size."""

    def __init__(self, path: Path, stream: Any) -> None:
        self._stream = stream
        self._left = max(MIN_DECOMPRESSED_BYTES, MAX_COMPRESSION_RATIO * path.stat().st_size)

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read the next bytes, or raise FileError."""
        size: int = self._stream.readinto(buffer)
        self._left -= size
        if self._left < 0:
            raise FileError(
                f"expands to more than {MAX_COMPRESSION_RATIO} times its size, and to more than "
                f"{MIN_DECOMPRESSED_BYTES // MIB:,} MiB; write it without repeated content, or without compression"
            )
        return size

    def close(self) -> None:
        """Close the file."""
        self._stream.close()
        super().close()
