"""Rows in columns as kubectl prints them: nothing is cut, so that grep and awk find what is there."""

from collections.abc import Iterable, Sequence
from typing import Final, TypeAlias

from rich.console import Group
from rich.text import Text

GAP: Final = 3
"""Blanks between two columns."""
Cell: TypeAlias = str | Text


def columns(headings: Sequence[str], rows: Iterable[Sequence[Cell]]) -> Group:
    """Return one line per row, each column as wide as its widest cell."""
    cells = [[Text(heading) for heading in headings], *([_text(cell) for cell in row] for row in rows)]
    widths = [max(cell.cell_len for cell in column) for column in zip(*cells, strict=True)]
    return Group(*(_line(row, widths) for row in cells))


def _text(cell: Cell) -> Text:
    return cell if isinstance(cell, Text) else Text(cell)


def _line(row: Sequence[Text], widths: Sequence[int]) -> Text:
    line = Text(no_wrap=True, overflow="ignore")
    for cell, width in zip(row, widths, strict=True):
        line.append_text(cell).append(" " * (width - cell.cell_len + GAP))
    line.rstrip()
    return line
