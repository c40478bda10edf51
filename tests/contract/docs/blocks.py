"""The fenced code blocks of every documentation page, with the position of each."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[3]
GENERATED: Final = ROOT / "docs/reference"
"""Written from the code, which `make check` compares."""
FOLDERS: Final = (".github", "docs", "charts", "examples", "benchmarks", "tests")
PAGES: Final = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    *(page for folder in FOLDERS for page in sorted((ROOT / folder).rglob("*.md"))),
    *sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")),
]
_BLOCK: Final = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One block: where it is, in which language, and what it says."""

    page: str
    line: int
    language: str
    text: str

    @property
    def position(self) -> str:
        """Return file and line, as editors write them."""
        return f"{self.page}:{self.line}"


def blocks(language: str) -> list[Block]:
    """Return every block of a language."""
    return [block for block in _every_block() if block.language == language]


def _every_block() -> Iterator[Block]:
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        for found in _BLOCK.finditer(text):
            if GENERATED not in path.parents:
                line = text.count("\n", 0, found.start()) + 1
                yield Block(str(path.relative_to(ROOT)), line, found[1], found[2])
