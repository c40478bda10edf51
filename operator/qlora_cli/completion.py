"""`kubectl_complete-qlora`: kubectl runs it for shell completion of `kubectl qlora`."""

import contextlib
import io
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from typing import Final

from qlora_cli.__main__ import app
from qlora_cli.console import echo

NO_FILES: Final = ":4"
FILES: Final = ":0"
"""Directives of cobra, on the last line: complete only with the list, or with files if it is empty."""


def complete_for_kubectl() -> None:
    """Print the completions for the words after `kubectl qlora`, the last of which is incomplete."""
    for line in completions(sys.argv[1:]):
        echo(line)


def completions(words: Sequence[str]) -> Iterator[str]:
    """Yield each completion with its help text, and finally a directive."""
    found = [line for line in _ask_typer(words).splitlines() if line.strip()]
    yield from found
    yield NO_FILES if found else FILES


def _ask_typer(words: Sequence[str]) -> str:
    """Return typer's completions for fish, which separates value and help by a tab, as kubectl does."""
    line = f"qlora {shlex.join(words[:-1])} {shlex.quote(words[-1]) if words and words[-1] else ''}"
    variables = {
        "_QLORA_COMPLETE": "complete_fish",
        "_TYPER_COMPLETE_ARGS": line,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    os.environ.update(variables)
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        app(prog_name="qlora")
    for name in variables:
        del os.environ[name]
    return output.getvalue()
