"""The links of a Markdown page; it knows no files."""

import re
from collections.abc import Callable, Iterator
from typing import Final

_FENCE: Final = re.compile(r"^ *(`{3,}|~{3,})", re.MULTILINE)
_TARGET: Final = re.compile(r"(?<=\]\()([^)\s]+)(?=\))")
_SCHEME: Final = re.compile(r"[a-z][a-z0-9+.-]*:")


def is_outside(target: str) -> bool:
    """Say whether a link leaves the repository: https:, mailto: and the like."""
    return _SCHEME.match(target) is not None


def _pieces(text: str) -> Iterator[tuple[bool, str]]:
    """Split a page into prose (True) and fenced blocks (False)."""
    begin, fence = 0, None
    for mark in _FENCE.finditer(text):
        if fence is None:
            yield True, text[begin : mark.start()]
            begin, fence = mark.start(), mark[1]
        elif mark[1].startswith(fence):
            yield False, text[begin : mark.end()]
            begin, fence = mark.end(), None
    yield fence is None, text[begin:]


def prose(text: str) -> str:
    """Return the page without its fenced blocks."""
    return "".join(piece for is_prose, piece in _pieces(text) if is_prose)


def links(text: str) -> list[str]:
    """Return every target that the page links to, in its order; code has no links."""
    return _TARGET.findall(prose(text))


def relink(text: str, move: Callable[[str], str]) -> str:
    """Return the page with each target replaced by what `move` makes of it."""
    return "".join(
        _TARGET.sub(lambda match: move(match[1]), piece) if is_prose else piece for is_prose, piece in _pieces(text)
    )
