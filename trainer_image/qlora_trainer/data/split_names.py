"""Names of data files: patterns that match several, and the split that a name says, as the datasets library has it."""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Final, Literal, NamedTuple
from urllib.parse import unquote

Split = Literal["train", "validation", "test"]

_KEYWORDS: Final[dict[Split, str]] = {
    "train": "train|training",
    "validation": "validation|valid|val|dev",
    "test": "test|testing|eval|evaluation",
}
_PATTERNS: Final = {
    split: re.compile(rf"(^|[-._ 0-9])({words})([-._ 0-9]|$)", re.IGNORECASE) for split, words in _KEYWORDS.items()
}
"""A keyword between separators: train-00000-of-00002.parquet, my_test.jsonl."""


class SelectedFiles(NamedTuple):
    """Files of a folder that are read, and those that belong to another split."""

    names: tuple[str, ...]
    left_out: tuple[str, ...]


_WILDCARD: Final = re.compile(r"[*?[]")


def is_pattern(name: str) -> bool:
    """Return whether a name has wildcards."""
    return _WILDCARD.search(name) is not None


def split_pattern(uri: str) -> tuple[str, str]:
    """Split a URI before the first part with wildcards, or before its name if there are none.

    Names in a file:// URI are escaped, and so are its wildcards.
    """
    scheme, _, rest = uri.partition("://")
    parts = [unquote(part) if scheme == "file" else part for part in rest.rstrip("/").split("/")]
    first = next((index for index, part in enumerate(parts) if index and is_pattern(part)), len(parts) - 1)
    folder = "/".join(rest.split("/")[:first]) or "/"
    return f"{scheme}://{folder}", "/".join(parts[first:])


def matches_pattern(path: str, pattern: str) -> bool:
    """Return whether a path matches: `*` and `?` within a part of it, `**` any number of parts."""
    parts = path.split("/")
    positions = {0}
    for wanted in pattern.split("/"):
        if wanted == "**":
            positions = set(range(min(positions, default=len(parts) + 1), len(parts) + 1))
        else:
            positions = {at + 1 for at in positions if at < len(parts) and fnmatchcase(parts[at], wanted)}
    return len(parts) in positions


def split_of(path: str) -> Split | None:
    """Return the split that a file's name says, or else a folder's, the nearest one first; None if none does."""
    for part in reversed(PurePosixPath(path).parts):
        found: list[Split] = [split for split, pattern in _PATTERNS.items() if pattern.search(part)]
        if found:
            return found[0]
    return None


def select_split(paths: Sequence[str], *, for_evaluation: bool) -> SelectedFiles:
    """Return the files of a folder to train on, or to evaluate on, where their names say so; otherwise all."""
    splits = {path: split_of(path) for path in paths}
    present = set(splits.values())
    if for_evaluation:
        wanted: set[Split | None] = {next((split for split in ("validation", "test") if split in present), None)}
        keep = wanted if wanted != {None} else present
    else:
        keep = {"train", None} if "train" in present else present
    return SelectedFiles(
        tuple(path for path in paths if splits[path] in keep), tuple(path for path in paths if splits[path] not in keep)
    )
