"""The table in docs/reliability.md: tests that ran replace their rows, all others are kept."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

BEGIN: Final = "<!-- Written by `make chaos`; do not edit. -->"
END: Final = "<!-- The end of what `make chaos` writes. -->"
HEADER: Final = ("| fault | promise | how it is provoked | last run |", "|---|---|---|---|")
_TEST: Final = re.compile(r" \(\[(?P<name>\w+)\]\(\.\./(?P<file>[^)]+)\)\)$")
"""The link to the test, at the end of the third cell."""


@dataclass(frozen=True)
class Row:
    """One promise and the result of its last run."""

    fault: str
    promise: str
    how: str
    result: str

    def render(self) -> str:
        """Return the row in Markdown."""
        cells = (
            " ".join(cell.split()).replace("|", "\\|") for cell in (self.fault, self.promise, self.how, self.result)
        )
        return f"| {' | '.join(cells)} |"


def read_row(line: str) -> Row:
    """Parse a rendered row."""
    cells = [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)]
    return Row(*cells[1:5])


def split_page(page: str) -> tuple[str, list[Row], str]:
    """Return the text before the table, its rows, and the text after it."""
    before, table, after = re.split(f"{re.escape(BEGIN)}|{re.escape(END)}", page)
    lines = [line for line in table.strip().splitlines() if line.startswith("|")]
    return before, [read_row(line) for line in lines[len(HEADER) :]], after


def link_to(file: str, name: str) -> str:
    """Return the link to the test, at the end of the third cell."""
    return f" ([{name}](../{file}))"


def is_kept(row: Row, root: Path) -> bool:
    """Return whether the test of a row still exists."""
    test = _TEST.search(row.how)
    path = root / test["file"] if test else root
    return test is not None and path.is_file() and f"def {test['name']}(" in path.read_text(encoding="utf-8")


def merge_rows(known: Iterable[Row], new: Iterable[Row], root: Path) -> list[Row]:
    """Replace rows of the same promise, and append the others."""
    rows = {(row.fault, row.promise): row for row in known if is_kept(row, root)}
    rows |= {(row.fault, row.promise): row for row in new}
    return list(rows.values())


def render_page(page: str, new: Iterable[Row], root: Path) -> str:
    """Return the page with an updated table."""
    before, known, after = split_page(page)
    table = "\n".join([*HEADER, *(row.render() for row in merge_rows(known, new, root))])
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"
