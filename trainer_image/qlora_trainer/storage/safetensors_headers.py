"""Headers of safetensors files, read without the tensors: what a model stores is known before its weights are here."""

import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from qlora_api.object_names import ObjectName
from qlora_api.reasons import Reason
from qlora_api.units import GIB, MIB
from qlora_trainer.errors import RunError
from qlora_trainer.runtime.resource_limits import memory_limit
from qlora_trainer.storage.snapshots import Snapshot
from qlora_trainer.storage.store import LFS_POINTER, FieldRef

_LENGTH_BYTES: Final = 8
"""The file begins with the length of the header, a little-endian 64-bit integer (the format's description)."""
_FIRST_READ_BYTES: Final = 100_000
"""97 % of the headers on the Hugging Face Hub are shorter (huggingface_hub#1855), so most need one request."""
_MAX_HEADER_BYTES: Final = 100 * MIB
"""The limit of the safetensors library."""
_HEADER_MEMORY_BYTES: Final = GIB
"""Memory to parse a header: ten times the largest one, as tensors take; empty lists take thirty times their size."""


def fetch_headers(snapshot: Snapshot, names: Iterable[str], folder: Path, field_ref: FieldRef) -> None:
    """Write files that have the headers of safetensors files, and holes in place of the tensors.

    Args:
        snapshot: The model's files.
        names: The safetensors files.
        folder: Receives a file of the same name and size for each of them; a hole takes no space on the disk.
        field_ref: The field of the spec, for messages.

    Raises:
        RunError: MODEL_UNSUPPORTED if a file is not a complete safetensors file.

    """
    for name in names:
        header, size = _read_header(snapshot, name, field_ref)
        path = ObjectName(name).below(folder)
        with path.open("wb") as stream:
            stream.write(header)
            try:
                stream.truncate(size)
            except (OSError, OverflowError) as error:
                raise _broken(
                    field_ref, name, f"announces {size:,} bytes, which no file here can have; copy the model again"
                ) from error


def _read_header(snapshot: Snapshot, name: str, field_ref: FieldRef) -> tuple[bytes, int]:
    """Return the first bytes of a file up to the end of its header, and the size of the file."""
    start, size = snapshot.read_start(name, _FIRST_READ_BYTES)
    if start.startswith(LFS_POINTER):
        raise _broken(field_ref, name, "is a pointer of git-lfs; run `git lfs pull` where the model was cloned")
    if len(start) < _LENGTH_BYTES:
        raise _broken(field_ref, name, f"has {size} bytes; copy the model again")
    (length,) = struct.unpack("<Q", start[:_LENGTH_BYTES])
    end = _LENGTH_BYTES + length
    if length > _MAX_HEADER_BYTES or end > size:
        raise _broken(
            field_ref, name, f"is no safetensors file, or was cut off after {size:,} bytes; copy the model again"
        )
    if end > len(start):
        start, _ = snapshot.read_start(name, end)
    stored = _LENGTH_BYTES + length + _tensor_bytes(start[_LENGTH_BYTES:end], name, field_ref)
    if stored != size:
        raise _broken(
            field_ref, name, f"has {size:,} of the {stored:,} bytes that its header announces; copy the model again"
        )
    return start[:end], size


def _tensor_bytes(header: bytes, name: str, field_ref: FieldRef) -> int:
    """Return the size of all tensors in bytes."""
    try:
        with memory_limit(_HEADER_MEMORY_BYTES):
            tensors = json.loads(header)
        return max((int(tensors[key]["data_offsets"][1]) for key in tensors if key != "__metadata__"), default=0)
    except MemoryError as error:
        raise _broken(field_ref, name, f"needs more than {_HEADER_MEMORY_BYTES // MIB:,} MiB for its header") from error
    except (ArithmeticError, ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise _broken(field_ref, name, "has a header that is not JSON of tensors; copy the model again") from error


def _broken(field_ref: FieldRef, name: str, what: str) -> RunError:
    return RunError(Reason.MODEL_UNSUPPORTED, f"{field_ref.field}: {name} {what}")
