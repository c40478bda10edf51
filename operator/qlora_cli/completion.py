"""`kubectl_complete-qlora`: what kubectl runs when somebody presses Tab behind `kubectl qlora`."""

import contextlib
import io
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from typing import Final

from qlora_cli.__main__ import app

NO_FILES: Final = ":4"
FILES: Final = ":0"
"""Directives of cobra, on the last line: keep to what is listed, or offer files where nothing is."""


def complete_for_kubectl() -> None:
    """Print the completions of the words behind `kubectl qlora`, the last of which is incomplete."""
    sys.stdout.writelines(f"{line}\n" for line in completions(sys.argv[1:]))


def completions(words: Sequence[str]) -> Iterator[str]:
    """Yield each completion with its help, and a directive at the end."""
    found = [line for line in _ask_typer(words).splitlines() if line.strip()]
    yield from found
    yield NO_FILES if found else FILES


def _ask_typer(words: Sequence[str]) -> str:
    """Ask as fish does, which takes value and help with a tab between them, as kubectl."""
    line = f"qlora {shlex.join(words[:-1])} {shlex.quote(words[-1]) if words and words[-1] else ''}"
    asked = {
        "_QLORA_COMPLETE": "complete_fish",
        "_TYPER_COMPLETE_ARGS": line,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    os.environ.update(asked)
    answer = io.StringIO()
    with contextlib.redirect_stdout(answer), contextlib.suppress(SystemExit):
        app(prog_name="qlora")
    for name in asked:
        del os.environ[name]
    return answer.getvalue()
