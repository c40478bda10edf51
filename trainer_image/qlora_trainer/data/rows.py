"""Parsed rows and their content hashes, and the checks that all row formats share."""

import hashlib
import json
import re
import sys
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from typing import Any, Final, TypeAlias

from qlora_api.units import MIB

MAX_ROW_BYTES: Final = 64 * MIB
"""Maximum size of a row in a text file: a million tokens take about 4 MiB, so a longer line is no row."""
MAX_TEXT_BYTES: Final = 8 * MIB
"""Maximum text of a row: 2 million tokens, twice the highest maxLength. The tokenizer takes 256 bytes per token (as
measured with tokenizers 0.23), and text that it does not know has a token per byte: 2 GiB of the prepare pod's 4."""
_SHOWN_CHARACTERS: Final = 500
"""Longest error message of a row: it may quote names and values from the row."""


class RowError(ValueError):
    """A row cannot be used; the message says why and how to fix it."""


def kind_of(value: Any) -> str:
    """Return the type of a value as a noun for error messages."""
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")


def shorten(message: object) -> str:
    """Return a message as text that can be written anywhere: cut to a length, half characters escaped."""
    text = str(message)
    cut = text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"
    return cut.encode(errors="backslashreplace").decode()


def size_of(content: Any) -> int:
    """Return the size of a text or of a nested value in bytes, or raise RowError if it is not valid Unicode."""
    try:
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, default=str)
        return len(text.encode())
    except TypeError as error:  # a map of a Parquet file may have bytes or dates as keys
        raise RowError("has an object whose keys are not text; write the keys as text") from error
    except UnicodeEncodeError as error:
        raise RowError("contains bytes that are not UTF-8, or half a character; save the file as UTF-8") from error


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
    if not blank and not any(map(_is_visible, value)):
        raise RowError(f"{label} is empty; fill it, or remove the row")
    try:
        size_of(value)
    except RowError as error:
        raise RowError(f"{label} {error}") from error
    return value


def _is_visible(character: str) -> bool:
    """Return whether a character is neither white space nor one without a glyph, such as a zero-width space."""
    return not character.isspace() and unicodedata.category(character) not in {"Cc", "Cf"}


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

    @property
    def question(self) -> str:
        """Return the text by which rows are grouped before they are split."""
        return self.prompt

    @property
    def size(self) -> int:
        """Return the bytes of the text."""
        return size_of(self.prompt) + size_of(self.answer)


@dataclass(frozen=True)
class Chat:
    """A conversation that ends with an assistant message."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    """JSON schemas of the tools that the assistant may call."""
    masked: tuple[int, ...] = ()
    """Indices of the answers that are not trained on."""

    @property
    def digest(self) -> bytes:
        """Return the SHA-256 of the content."""
        masked = {"masked": self.masked} if self.masked else {}
        return _sha256({"messages": self.messages, "tools": self.tools, **masked})

    @property
    def question(self) -> str:
        """Return what comes before the first answer, by which conversations are grouped before they are split.

        A system message may hold the document that a question is about.
        """
        asked = takewhile(lambda message: message["role"] != "assistant", self.messages)
        return "\n".join(str(message["content"]) for message in asked)

    @property
    def size(self) -> int:
        """Return the bytes of all messages and tools, or raise RowError if they are not valid Unicode."""
        return size_of(self.messages) + size_of(self.tools)


@dataclass(frozen=True)
class Text:
    """Plain text."""

    text: str

    @property
    def digest(self) -> bytes:
        """Return the SHA-256 of the content."""
        return _sha256({"text": self.text})

    @property
    def question(self) -> str:
        """Return the text itself."""
        return self.text

    @property
    def size(self) -> int:
        """Return the bytes of the text."""
        return size_of(self.text)


Row: TypeAlias = Example | Chat | Text


def check_size(row: Row) -> Row:
    """Return the row, or raise RowError if it has more text than can be tokenized."""
    if row.size > MAX_TEXT_BYTES:
        raise RowError(f"has more than {MAX_TEXT_BYTES // MIB} MiB of text; split it into several rows")
    return row


def group_of(row: Row) -> int:
    """Return 64 bits of the hash of a row's question, whatever its case, white space and Unicode form."""
    question = row.question if row.question.isascii() else _long_marks().sub(r"\g<0> ", row.question)
    normal = " ".join(unicodedata.normalize("NFKC", question).casefold().split())
    return int.from_bytes(hashlib.sha256(normal.encode()).digest()[:8], "big")


@cache
def _long_marks() -> re.Pattern[str]:
    """Return a pattern of 100 accents in a row, which Python sorts in quadratic time."""
    marks = filter(unicodedata.combining, map(chr, range(sys.maxunicode + 1)))
    return re.compile(f"[{''.join(marks)}]{{100}}")


def _sha256(content: Any) -> bytes:
    return hashlib.sha256(json.dumps(content, default=str).encode()).digest()
