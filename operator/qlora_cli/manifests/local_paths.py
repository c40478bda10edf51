"""Turns the local paths of a manifest into absolute file:// URIs, before its spec is parsed.

A cluster gets no such path: its rules refuse every file:// URI.
"""

import copy
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from qlora_cli.manifests.validation_messages import write_location
from qlora_cli.manifests.yaml_documents import Document, Location, YamlError
from qlora_cli.uris import (
    FILE_SCHEME,
    LocalPathError,
    has_scheme,
    path_of_relative_uri,
    to_absolute_path,
    to_display_path,
)

DATA_FILE: Final = re.compile(r"\.(jsonl|json|csv|tsv|parquet|arrow|txt)(\.gz|\.zst)?$", re.IGNORECASE)
"""Names of data files; a path with another name is one only if it exists, or starts with './', '../', '/' or '~'."""
_EXPLICIT: Final = re.compile(r"~?/|\.\.?(/|$)|~$")
_BLOCKS: Final = ("model", "dataset", "output")


def resolve_local_paths(document: Document, base: Path) -> Document:
    """Return the document with its local paths as file:// URIs.

    Args:
        document: A QLoRAJob.
        base: Folder that relative paths start from: the manifest's.

    Raises:
        YamlError: A path cannot be used on this machine; the message has position, field, cause and fix.

    """
    value = copy.deepcopy(document.value)
    for parent, location in _uri_fields(value):
        try:
            parent["uri"] = to_local_uri(location, parent["uri"], base)
        except LocalPathError as error:
            raise YamlError(f"{document.position_of(location)}: {error}") from error
    return replace(document, value=value)


def to_local_uri(location: Location, text: str, base: Path) -> str:
    """Return the file:// URI of a local path, and every other text unchanged.

    Args:
        location: Field of the spec, which decides what a word such as `a/b` is: a model of the hub, or a folder.
        text: What the manifest says.
        base: Folder that relative paths start from.

    Raises:
        LocalPathError: The path cannot be used on this machine.

    """
    field = write_location(location)
    if text.startswith(FILE_SCHEME):
        path = path_of_relative_uri(text)
        if path is None:
            to_absolute_path(to_display_path(text), field)
            return text
        return _as_uri(path, field, base)
    is_path = "://" not in text and text != "" and "\0" not in text
    return _as_uri(text, field, base) if is_path and _is_local(location, text, base) else text


def _uri_fields(value: Any) -> Iterator[tuple[dict[str, Any], Location]]:
    """Yield each block with the uri of a model, of data or of an output, and the field's location."""
    spec = value.get("spec") if isinstance(value, dict) else None
    if not isinstance(spec, dict):
        return
    for name in _BLOCKS:
        block = spec.get(name)
        yield from _with_uri(block, ("spec", name))
        if name == "dataset" and isinstance(block, dict):
            yield from _with_uri(block.get("evaluation"), ("spec", name, "evaluation"))
            sources = block.get("sources")
            for index, source in enumerate(sources if isinstance(sources, list) else ()):
                yield from _with_uri(source, ("spec", name, "sources", index))


def _with_uri(block: Any, location: Location) -> Iterator[tuple[dict[str, Any], Location]]:
    if isinstance(block, dict) and isinstance(block.get("uri"), str):
        yield block, (*location, "uri")


def _is_local(location: Location, text: str, base: Path) -> bool:
    if _EXPLICIT.match(text) or "output" in location:
        return True
    if "dataset" in location and DATA_FILE.search(text.rstrip("/")):
        return True
    return _exists(text, base)


def _exists(text: str, base: Path) -> bool:
    try:
        return (base / text).exists()
    except (OSError, ValueError):  # such as a name that is too long, or half a character
        return False


def _as_uri(path: str, field: str, base: Path) -> str:
    """Return an absolute file:// URI; a trailing '/' (a folder) is kept."""
    absolute = to_absolute_path(path, field, base)
    return absolute.as_uri() + ("/" if path.endswith("/") and absolute != absolute.parent else "")


def local_fields(value: Any) -> dict[str, str]:
    """Return the local path of each field that has one, by the field's path."""
    found = {}
    for parent, location in _uri_fields(value):
        if parent["uri"].startswith("file://"):
            found[write_location(location)] = to_display_path(parent["uri"])
    return found


def is_missing(path: str) -> bool:
    """Return whether nothing is at a local path; wildcards are not expanded."""
    return not any(character in path for character in "*?[") and not Path(path).exists()


def is_folder_or_uri(text: str) -> bool:
    """Return whether an argument is a path or a URI, and not the name of a QLoRAJob."""
    return has_scheme(text) or "/" in text or text.startswith((".", "~"))
