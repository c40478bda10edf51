"""Finds a model's config.json locally: from --config, in the model's folder, or in a hub cache."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from qlora_api.foreign_files import read_named, read_start
from qlora_api.model_config import MAX_CONFIG_BYTES
from qlora_api.object_names import ObjectName
from qlora_api.untrusted_json import InvalidJsonError, parse_object
from qlora_api.v1alpha1 import ModelSpec
from qlora_cli.hub_cache import hub_caches
from qlora_cli.uris import to_display_path

_HUB: Final = "hf://"
_CONFIG: Final = "config.json"
MAX_REF_BYTES: Final = 256
"""A ref of a hub cache has a commit and a newline."""


class NoConfigError(Exception):
    """The model's config.json was not found locally; the message says how to provide it."""


def load_config(model: ModelSpec, given: str | None, mirror: str | None) -> Mapping[str, Any]:
    """Return the config.json of a model, without network access.

    Args:
        model: The model.
        given: Path of a config.json (--config); None: look it up.
        mirror: Folder or URI of a hub mirror; None: use the hub cache.

    Raises:
        NoConfigError: It was not found, or cannot be read.

    """
    path = Path(given) if given else find_config(model, mirror)
    try:
        # What a person names may be a pipe, such as <(curl …); what is in a folder may not.
        content = read_named(path, MAX_CONFIG_BYTES + 1) if given else read_start(path, MAX_CONFIG_BYTES + 1)
        return parse_object(content, MAX_CONFIG_BYTES)
    except InvalidJsonError as error:
        raise NoConfigError(f"{path} {error}; pass the model's own {_CONFIG}") from error
    except (OSError, ValueError) as error:
        cause = error.strerror if isinstance(error, OSError) else error
        raise NoConfigError(f"{path}: {cause}; pass --config {_CONFIG}") from error


def find_config(model: ModelSpec, mirror: str | None) -> Path:
    """Return the path of a model's config.json."""
    if model.uri.startswith("file://"):
        return Path(to_display_path(model.uri)) / _CONFIG
    if not model.uri.startswith(_HUB):
        raise NoConfigError(f"spec.model.uri is {model.uri}, which is not on this machine; pass --config config.json")
    name = model.uri.removeprefix(_HUB)
    for cache in hub_caches(mirror):
        if (path := _in_cache(cache, name, model.revision)) is not None:
            return path
    searched = " or ".join(map(str, hub_caches(mirror)))
    raise NoConfigError(
        f"spec.model.uri: {_CONFIG} of {name} at {model.revision} is not in {searched}; "
        f"run 'hf download {name} {_CONFIG}', or pass --config {_CONFIG}"
    )


def _in_cache(cache: Path, name: str, revision: str) -> Path | None:
    """Find config.json by the documented layout of the cache, so that huggingface_hub need not be installed."""
    repository = cache / f"models--{name.replace('/', '--')}"
    with contextlib.suppress(OSError):  # such as a link to a name that is too long
        return next((path for path in _candidates(repository, revision) if path.is_file()), None)
    return None


def _candidates(repository: Path, revision: str) -> Iterator[Path]:
    with contextlib.suppress(OSError, ValueError):  # a ref that is no text, or names no folder
        reference = repository / "refs" / revision
        commit = read_start(reference, MAX_REF_BYTES).decode().strip() if reference.is_file() else revision
        yield ObjectName(commit).below(repository / "snapshots") / _CONFIG
