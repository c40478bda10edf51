"""Parsed rows and their content hashes, and the checks that all row formats share."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from qlora_api.units import MIB

MAX_ROW_BYTES: Final = 64 * MIB
"""Maximum size of a row: a million tokens take about 4 MiB, so a longer line means that the file is no JSONL."""


class RowError(ValueError):
    """A row cannot be used; the message says why and how to fix it."""


def kind_of(value: Any) -> str:
    """Return the type of a value as a noun for error messages."""
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")


def is_nested_deeper(value: Any, levels: int) -> bool:
    """Return whether lists and objects are nested in more than so many levels."""
    nested = [value] if isinstance(value, (dict, list)) else []
    for _ in range(levels):
        children = (child for parent in nested for child in (parent.values() if isinstance(parent, dict) else parent))
        nested = [child for child in children if isinstance(child, (dict, list))]
        if not nested:
            return False
    return True


def text_of(fields: Mapping[str, Any], name: str, *, blank: bool = False, within: str = "") -> str:
    """Return a text field, or raise RowError if it is missing, not valid text, or blank without `blank`."""
    label = f"{within}.{name}" if within else f"field '{name}'"
    if name not in fields:
        raise RowError(f"{label} is missing; add it")
    value = fields[name]
    if value is None and blank:
        return ""
    if not isinstance(value, str):
        shown = f" ({value})" if isinstance(value, (int, float)) else ""
        raise RowError(f"{label} is {kind_of(value)}{shown}, not text; write a string")
    if not blank and not value.strip():
        raise RowError(f"{label} is empty; fill it, or remove the row")
    if not _is_unicode(value):
        raise RowError(f"{label} contains bytes that are not UTF-8, or half a character; save the file as UTF-8")
    return value


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


Message: TypeAlias = Mapping[str, Any]
"""role and content, as chat templates expect them; also tool_calls and similar fields."""


@dataclass(frozen=True)
class Example:
    """A prompt as the model sees it, and the expected answer."""

    prompt: str
    answer: str

    @property
    def digest(self) -> bytes:
        """Return the SHA-256 of the content; equal rows have equal digests."""
        return _sha256([self.prompt, self.answer])


@dataclass(frozen=True)
class Chat:
    """A conversation that ends with an assistant message."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    """JSON schemas of the tools that the assistant may call."""

    @property
    def digest(self) -> bytes:
        """Return the SHA-256 of the content."""
        return _sha256({"messages": self.messages, "tools": self.tools})


@dataclass(frozen=True)
class Text:
    """Plain text."""

    text: str

    @property
    def digest(self) -> bytes:
        """Return the SHA-256 of the content."""
        return _sha256({"text": self.text})


Row: TypeAlias = Example | Chat | Text


def _sha256(content: Any) -> bytes:
    return hashlib.sha256(json.dumps(content, default=str).encode()).digest()
