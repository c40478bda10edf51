"""Output formats: columns, JSON, YAML, ages."""

import json
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any, Final, TypeAlias

import yaml
from rich.console import Group
from rich.text import Text

from qlora_api.escapes import escape_json, escape_line, escape_text
from qlora_api.names import Phase
from qlora_api.units import format_duration
from qlora_cli.console import echo
from qlora_cli.options import OutputFormat

PHASE_STYLES: Final = {Phase.SUCCEEDED: "green", Phase.FAILED: "red", Phase.SUSPENDED: "yellow", Phase.TRAINING: "cyan"}


GAP: Final = 3
"""Spaces between two columns."""
Cell: TypeAlias = str | Text


def render_columns(headings: Sequence[str], rows: Iterable[Sequence[Cell]]) -> Group:
    """Return one line per row, each column as wide as its widest cell."""
    cells = [[Text(heading) for heading in headings], *([_text(cell) for cell in row] for row in rows)]
    widths = [max(cell.cell_len for cell in column) for column in zip(*cells, strict=True)]
    return Group(*(_line(row, widths) for row in cells))


def _text(cell: Cell) -> Text:
    return cell if isinstance(cell, Text) else Text(escape_line(cell))


def _line(row: Sequence[Text], widths: Sequence[int]) -> Text:
    line = Text(no_wrap=True, overflow="ignore")
    for cell, width in zip(row, widths, strict=True):
        line.append_text(cell).append(" " * (width - cell.cell_len + GAP))
    line.rstrip()
    return line


WIDTH: Final = 120
_TEXT: Final = "tag:yaml.org,2002:str"


class _Dumper(yaml.SafeDumper):
    """Writes repeated values in full (no anchors), and multi-line strings as block scalars."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 (PyYAML's signature)
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar(_TEXT, text, style=style if escape_text(text) == text else '"')


_Dumper.add_representer(str, _represent_text)


def to_yaml(value: Any) -> str:
    """Format a value as one YAML document, with its fields in their order; what a terminal cannot show is escaped."""
    return escape_text(yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=WIDTH))


def print_data(value: Any, output: OutputFormat) -> None:
    """Print a value as JSON or YAML."""
    if output is OutputFormat.YAML:
        echo(to_yaml(value), nl=False)
    else:
        echo(escape_json(json.dumps(value, indent=2, ensure_ascii=False)))


def format_age(then: datetime, now: datetime) -> str:
    """Format the time from `then` to `now` in its two largest units."""
    return format_duration(max(int((now - then).total_seconds()), 0))
