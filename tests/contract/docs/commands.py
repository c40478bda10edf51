"""The commands in code blocks of the documentation, as argument lists of the programs that they run."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from docs.site.links import prose
from tests.contract.docs.blocks import PAGES, ROOT, blocks

_TYPED: Final = re.compile(r"^\$ ((?:.*\\\n)*.*)$", re.MULTILINE)
_INLINE: Final = re.compile(
    r"(?<!`)`((?:[a-z./]*/)?(?:aws|docker|helm|kind|kubectl|make|python|qlora)(?: [^`\n]+))`(?!`)"
)
_SEPARATORS: Final = frozenset({"|", "||", "&&", ";", "&"})


@dataclass(frozen=True)
class Command:
    """One program with its arguments; `complete` unless a sentence only mentions it."""

    place: str
    words: tuple[str, ...]
    complete: bool = True

    def __str__(self) -> str:
        return f"{self.place}: {' '.join(self.words)}"


def split(line: str) -> Iterator[tuple[str, ...]]:
    """Yield the arguments of each program on a line, as a shell splits them, without redirections and comments."""
    lexer = shlex.shlex(line.replace("\\\n", " "), posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in lexer:
        if word in _SEPARATORS:
            yield tuple(words)
            words = []
        else:
            words.append(word)
    if words:
        yield tuple(words)


def commands() -> list[Command]:
    """Return every command of every page: those of console blocks, and those in sentences."""
    found = [
        Command(block.position, words)
        for block in blocks("console")
        for line in _TYPED.findall(block.text)
        for words in split(line)
    ]
    for page in PAGES:
        place = str(page.relative_to(ROOT))
        for line in _INLINE.findall(prose(page.read_text(encoding="utf-8"))):
            found += [Command(place, words, complete=False) for words in split(line)]
    return found
