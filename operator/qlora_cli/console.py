"""The only place that writes to a terminal; there, text of others is shown and never interpreted."""

import logging
from collections.abc import Iterable
from typing import Any

import rich.console
import typer
from rich.segment import Segment
from rich.text import Text

from qlora_api.escapes import escape_line, escape_text


class Console(rich.console.Console):
    """A console without markup and emoji codes, on which control characters and invisible ones become escapes."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"highlight": False, "markup": False, "emoji": False, **options})

    def render_str(self, text: str, *args: Any, **options: Any) -> Text:
        """Return a string as `Text`; rich drops some control characters of a `Text`, so they are escaped before."""
        return super().render_str(escape_text(text), *args, **options)

    def render(
        self, renderable: rich.console.RenderableType, options: rich.console.ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Yield the segments of a renderable; only rich's own control codes reach the terminal."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=escape_text(segment.text))


def print_text(console: rich.console.Console, text: str, label: str = "", style: str = "") -> None:
    """Print a text of one or several lines, after a label of our own."""
    console.print(Text.assemble((escape_line(label), style), escape_text(text)), soft_wrap=True)


def print_line(console: rich.console.Console, text: str, label: str = "", style: str = "") -> None:
    """Print one line, after a label of our own; a line break inside is an escape, so that nobody can forge a line."""
    print_text(console, escape_line(text), label, style)


class _MessageFormatter(logging.Formatter):
    """Formats a record as its message."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the message, and the traceback if there is one."""
        return escape_text(super().format(record))


def escape_log_messages() -> None:
    """Escape what libraries log while no handler is configured; Python writes that to standard error."""
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_MessageFormatter())


def echo(text: str = "", *, err: bool = False, nl: bool = True) -> None:
    """Write a text that programs read too: without styles, tabs as they are."""
    typer.echo(escape_text(text), err=err, nl=nl)
