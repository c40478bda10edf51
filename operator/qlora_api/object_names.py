"""Names of objects that others choose: keys of a bucket, files of a repository, entries of a manifest."""

import re
import unicodedata
from pathlib import Path
from typing import Any, Final, Self

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from qlora_api.escapes import cut_escaped

MAX_SEGMENT_BYTES: Final = 255
"""NAME_MAX of Linux file systems, in UTF-8."""
MAX_NAME_BYTES: Final = 1024
"""Maximum length of an S3 key, in UTF-8."""
_UNPRINTABLE: Final = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode categories: control, format (bidirectional and invisible), lone surrogate, line and paragraph separator."""
_DRIVE: Final = re.compile("[A-Za-z]:")


class ObjectName(str):
    """A relative name below a folder or prefix; no such name leads out of it, whoever chose it."""

    __slots__ = ()

    def __new__(cls, text: str) -> Self:
        """Check a name.

        Args:
            text: Segments separated by '/'.

        Raises:
            ValueError: The name is refused; the message has name, cause and fix.

        """
        if cause := _cause_of_refusal(text):
            raise ValueError(f"the name {_quoted(text)} {cause}; rename it")
        return super().__new__(cls, text)

    def below(self, folder: Path) -> Path:
        """Return the local path of the name below a folder; the only way to join a folder and a foreign name."""
        return folder / self

    def relative_to(self, folder: str) -> "ObjectName":
        """Return the name relative to a folder that contains it; an empty folder contains every name."""
        return ObjectName(self.removeprefix(f"{folder}/")) if folder else self

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Check the name in pydantic."""
        return core_schema.no_info_after_validator_function(cls, core_schema.str_schema())


def _cause_of_refusal(text: str) -> str:
    """Return why a text is no object name; empty if it is one."""
    if any(unicodedata.category(character) in _UNPRINTABLE for character in text):
        return "contains a control character, an invisible character or half a surrogate pair"
    if "\\" in text or _DRIVE.match(text):
        return "contains a backslash or starts with a drive letter"
    segments = text.split("/")
    if not all(segments):
        return "is empty, starts or ends with '/', or contains '//'"
    if not {".", ".."}.isdisjoint(segments):
        return "contains a '.' or '..' segment"
    if len(text.encode()) > MAX_NAME_BYTES or any(len(segment.encode()) > MAX_SEGMENT_BYTES for segment in segments):
        return f"is longer than {MAX_NAME_BYTES} bytes, or {MAX_SEGMENT_BYTES} in a segment"
    return ""


def _quoted(text: str) -> str:
    """Return a printable form of any text, shortened."""
    printable = all(unicodedata.category(character) not in _UNPRINTABLE for character in text)
    quoted = f"'{text}'" if printable else ascii(text)
    return quoted if len(quoted) <= MAX_SEGMENT_BYTES else f"{cut_escaped(quoted, MAX_SEGMENT_BYTES)}…"
