r"""Escapes text of others (log lines, rows, answers, file names) for terminals, logs, pages and shell commands.

Python, YAML in double quotes, CEL and bash in $'…' read the escapes alike: \n, \x1b, \u202e, \U000e0041.
"""

import json
import re
import shlex
from typing import Final

INVISIBLE: Final = (
    "\x00-\x1f\x7f-\x9f\xad\u034f\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u115f\u1160\u17b4\u17b5\u180b-\u180f"
    "\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff\uffa0\ufff0-\ufffb"
    "\U000110bd\U000110cd\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
"""Body of a character class: Unicode categories Cc, Cf, Zl and Zp, and the property Default_Ignorable_Code_Point
(Unicode 17, DerivedCoreProperties.txt), without JOINERS and _VARIATION_SELECTORS."""
JOINERS: Final = "\u200c\u200d"
"""They decide the shape of Arabic and Indic letters, and join emoji; between other characters they are invisible."""
_VARIATION_SELECTORS: Final = "\ufe00-\ufe0f"
_SURROGATES: Final = "\ud800-\udfff"

_EMOJI: Final = "\u00a9\u00ae\u203c\u2049\u2100-\u27ff\u2900-\u2bff\u3030\u303d\u3297\u3299\U0001f000-\U0001faff"
_HAN: Final = "\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_JOINING_SCRIPTS: Final = "\u0620-\u06d3\u06ee-\u06ff\u0710-\u07ff\u08a0-\u08e1\u0900-\u0dff\u1000-\u109f\u1780-\u17b3"
"""Arabic, Syriac, Thaana, N'Ko, the scripts of India, Myanmar, Khmer."""

_UNPRINTABLE: Final = (
    rf"[{INVISIBLE}{_SURROGATES}]"
    rf"|(?<![{_JOINING_SCRIPTS}{_EMOJI}\ufe0f])[{JOINERS}]"
    rf"|[{JOINERS}](?![{_JOINING_SCRIPTS}{_EMOJI}])"
    rf"|(?<![{_EMOJI}{_HAN}])[{_VARIATION_SELECTORS}](?!\u20e3)"
)
_SUSPICIOUS: Final = re.compile(f"[{INVISIBLE}{_SURROGATES}{JOINERS}{_VARIATION_SELECTORS}]")
"""What few lines have, and what takes a tenth of the time to find."""
_IN_LINE: Final = re.compile(_UNPRINTABLE)
_IN_TEXT: Final = re.compile(rf"(?![\n\t]|\r\n)(?:{_UNPRINTABLE})")
_BLANKS: Final = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}
_PARTIAL_ESCAPE: Final = re.compile(r"\\(x[0-9a-f]?|u[0-9a-f]{0,3}|U[0-9a-f]{0,7})?\Z")
_FIRST_TWO_BYTES: Final = 0x80
"""From here on bash reads \\xHH as one byte of UTF-8, not as a character."""


def escape_text(text: str) -> str:
    """Return a text of several lines, with visible escapes for what changes a terminal or cannot be seen."""
    return text if _is_plain(text) else _IN_TEXT.sub(_escape, text)


def escape_line(text: str) -> str:
    """Return a text as one line: as `escape_text`, with escapes for line breaks and tabs too."""
    return text if _is_plain(text) else _IN_LINE.sub(_escape, text)


def cut_escaped(line: str, max_characters: int, max_bytes: int | None = None) -> str:
    """Return the start of an escaped line, without a part of an escape or a lone joiner at its end."""
    cut = line[:max_characters]
    if max_bytes is not None:
        cut = cut.encode()[:max_bytes].decode(errors="ignore")
    return line if cut == line else _PARTIAL_ESCAPE.sub("", cut).rstrip(JOINERS)


def escape_json(document: str) -> str:
    r"""Return a JSON document with the same content, with JSON escapes for what `escape_text` escapes."""
    return document if _is_plain(document) else _IN_TEXT.sub(lambda match: json.dumps(match[0])[1:-1], document)


def shell_command(*words: str) -> str:
    """Return a command to paste into bash, which gets exactly these words."""
    return " ".join(map(_quote, words))


def _quote(word: str) -> str:
    if escape_line(word) == word:
        return shlex.quote(word)
    backslashes = word.replace("\\", r"\\").replace("'", r"\'")
    return f"$'{escape_line(backslashes)}'"


def _is_plain(text: str) -> bool:
    return (text.isascii() and text.isprintable()) or _SUSPICIOUS.search(text) is None


def _escape(match: re.Match[str]) -> str:
    character, code = match[0], ord(match[0])
    if character in _BLANKS:
        return _BLANKS[character]
    return f"\\x{code:02x}" if code < _FIRST_TWO_BYTES else f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"
