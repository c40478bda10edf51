"""`--set path=value`: overrides one field of the spec."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from qlora_cli.manifests.local_paths import to_local_uri
from qlora_cli.manifests.yaml_documents import Document, parse_value
from qlora_cli.uris import LocalPathError

SET_OPTION: Final = "--set"


class OverrideError(ValueError):
    """The option is invalid; the message says why."""


@dataclass(frozen=True)
class Override:
    """A field and its new value."""

    location: tuple[str, ...]
    value: Any


def parse_override(text: str) -> Override:
    """Parse lora.rank=8 or spec.lora.rank=8; a local path becomes a file:// URI."""
    path, sign, value = text.partition("=")
    location = ("spec", *path.strip().removeprefix("spec.").split("."))
    if not sign or not all(location):
        raise OverrideError(f"write {SET_OPTION} path=value, such as {SET_OPTION} lora.rank=8; got {text!r}")
    parsed = parse_value(value)
    if location[-1] == "uri" and isinstance(parsed, str):
        try:
            return Override(location, to_local_uri(location, parsed, Path.cwd()))
        except LocalPathError as error:
            raise OverrideError(f"{SET_OPTION} {error}") from error
    return Override(location, parsed)


def apply_overrides(document: Document, overrides: Iterable[Override]) -> Document:
    """Return the document with the overrides applied; unknown paths are found when it is parsed."""
    value, positions = copy.deepcopy(document.value), dict(document.positions)
    for override in overrides:
        _set(value, override)
        path = override.location
        positions = {location: position for location, position in positions.items() if location[: len(path)] != path}
        positions |= {path[:depth]: SET_OPTION for depth in range(2, len(path) + 1) if path[:depth] not in positions}
    return replace(document, value=value, positions=positions)


def override_manifest(value: dict[str, Any], overrides: Iterable[Override]) -> dict[str, Any]:
    """Return a manifest that is not from a file, with the overrides applied."""
    return dict(apply_overrides(Document("", value, {}), overrides).value)


def _set(value: Any, override: Override) -> None:
    *parents, last = override.location
    for depth, name in enumerate(parents, start=1):
        if not isinstance(value, dict):
            break
        value = value.setdefault(name, {})
        if not isinstance(value, dict):
            raise OverrideError(f"{'.'.join(override.location)}: {'.'.join(override.location[:depth])} has no fields")
    if isinstance(value, dict):
        value[last] = override.value
