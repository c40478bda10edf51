"""Files of a model's folder that name other files; the author of the model chooses these names."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ValidationError

from qlora_api.foreign_files import find_special, read_file
from qlora_api.object_names import ObjectName
from qlora_api.reasons import Reason
from qlora_api.tolerant_reader import ignore_unknown
from qlora_api.units import MIB
from qlora_trainer.errors import RunError
from qlora_trainer.model.generation_config import check_generation_config
from qlora_trainer.storage.local_store import files_below
from qlora_trainer.storage.store import FieldRef

SHARD_INDEX: Final = "model.safetensors.index.json"
"""Which safetensors file has which weight, in the Hugging Face format."""
_SINGLE_FILE: Final = "model.safetensors"
_ANY_SHARD_INDEX: Final = "*.safetensors.index.json"
"""config.json may name another index (`transformers_weights`), also in a subfolder."""
_WEIGHTS_SUFFIX: Final = ".safetensors"
_ADAPTER: Final = "adapter_config.json"


_MAX_INDEX_BYTES: Final = 64 * MIB
"""Largest index that is read; one of a model with 150,000 weights has 15 MiB."""


class _ShardIndex(BaseModel):
    metadata: object = None
    weight_map: dict[str, ObjectName]


def check_model_files(folder: Path, field: str = "spec.model.uri") -> None:
    """Refuse a model's folder that would make transformers read weights from somewhere else, or wait for ever.

    Raises:
        RunError: UNSAFE_MODEL_FORMAT for an index that names other files than safetensors files of the folder;
            MODEL_UNSUPPORTED for an adapter, instead of which transformers loads the base that it names, for a pipe or
            a device, and for generation settings that cannot be read.

    """
    check_no_special(folder, field)
    # What cannot be read is no index that transformers could read.
    files = files_below(folder, lambda _path, _error: None)
    for index in sorted(file for file in files if file.match(_ANY_SHARD_INDEX)):
        load_shard_index(index, field)
    if (folder / _ADAPTER).is_file():
        raise RunError(
            Reason.MODEL_UNSUPPORTED, f"{field}: {_ADAPTER}: this is an adapter and not a model; name its base, merged"
        )
    check_generation_config(folder, field)


def check_no_special(folder: Path, field: str) -> None:
    """Raise ModelUnsupported for a folder with a pipe or a device, which the libraries open as any other file."""
    if special := find_special(folder):
        name = special.relative_to(folder)
        raise RunError(Reason.MODEL_UNSUPPORTED, f"{field}: {name} is a pipe or a device, and no file; remove it")


def load_shard_index(index: Path, field: str = "spec.model.uri") -> Mapping[str, Path]:
    """Return the safetensors file of each weight, as an index lists them; raises like `check_model_files`."""
    try:
        files = ignore_unknown(_ShardIndex, read_file(index, _MAX_INDEX_BYTES), index.name).weight_map
    except ValidationError as error:
        raise _refused(index, field, error.errors(include_url=False)[0]["msg"]) from error
    except OSError as error:
        raise _refused(index, field, error.strerror or str(error)) from error
    if stray := next((file for file in files.values() if not file.endswith(_WEIGHTS_SUFFIX)), None):
        raise _refused(index, field, f"'{stray}' is no {_WEIGHTS_SUFFIX} file")
    return {name: file.below(index.parent) for name, file in files.items()}


def check_shards(folder: Path, files: Iterable[str], field_ref: FieldRef) -> None:
    """Check that every file which the index names is there.

    Args:
        folder: The model's small files.
        files: The names of all files of the model, relative to its folder.
        field_ref: The field of the spec, for messages.

    Raises:
        RunError: The field's not-found reason, or as `check_model_files`.

    """
    index, names = folder / SHARD_INDEX, set(files)
    if not index.is_file() or _SINGLE_FILE in names:  # transformers prefers the single file
        return
    shards = {path.relative_to(folder).as_posix() for path in load_shard_index(index, field_ref.field).values()}
    missing = sorted(shards - names)
    if missing:
        raise RunError(
            field_ref.not_found,
            f"{field_ref.field}: {SHARD_INDEX} names {len(shards)} files, and {len(missing)} of them "
            f"{'is' if len(missing) == 1 else 'are'} missing, such as {missing[0]!r}; copy the model again",
        )


def _refused(index: Path, field: str, cause: str) -> RunError:
    message = f"{field}: {index.name}: weight_map: {cause}; correct the index, or choose another revision"
    return RunError(Reason.UNSAFE_MODEL_FORMAT, message)
