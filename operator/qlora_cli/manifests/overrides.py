"""`--set path=value`: one field of the spec, changed for this run."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Final

from qlora_cli.manifests.yaml_documents import Document, parse_value
from qlora_cli.uris import to_uri

SET_OPTION: Final = "--set"


class OverrideError(ValueError):
    """The option cannot be read; the message says why."""


@dataclass(frozen=True)
class Override:
    """A field and its new value."""

    location: tuple[str, ...]
    value: Any


def parse_override(text: str) -> Override:
    """Read lora.rank=8 or spec.lora.rank=8; a path given for a uri becomes a file:// URI."""
    path, sign, value = text.partition("=")
    location = ("spec", *path.strip().removeprefix("spec.").split("."))
    if not sign or not all(location):
        raise OverrideError(f"write {SET_OPTION} path=value, such as {SET_OPTION} lora.rank=8; got {text!r}")
    parsed = parse_value(value)
    return Override(location, to_uri(parsed) if location[-1] == "uri" and isinstance(parsed, str) else parsed)


def apply_overrides(document: Document, overrides: Iterable[Override]) -> Document:
    """Return the document with the fields changed; a path that does not exist shows when it is parsed."""
    value, places = copy.deepcopy(document.value), dict(document.positions)
    for change in overrides:
        _set(value, change)
        places = {
            location: place for location, place in places.items() if location[: len(change.location)] != change.location
        }
        places |= {
            change.location[:depth]: SET_OPTION
            for depth in range(2, len(change.location) + 1)
            if change.location[:depth] not in places
        }
    return replace(document, value=value, positions=places)


def override_manifest(value: dict[str, Any], overrides: Iterable[Override]) -> dict[str, Any]:
    """Return a manifest that has no file with the fields changed."""
    return dict(apply_overrides(Document("", value, {}), overrides).value)


def _set(value: Any, change: Override) -> None:
    *parents, last = change.location
    for depth, name in enumerate(parents, start=1):
        if not isinstance(value, dict):
            break
        value = value.setdefault(name, {})
        if not isinstance(value, dict):
            raise OverrideError(f"{'.'.join(change.location)}: {'.'.join(change.location[:depth])} has no fields")
    if isinstance(value, dict):
        value[last] = change.value
