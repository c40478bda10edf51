"""Running other programs to their end, and waiting for a condition."""

import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

Argv: TypeAlias = Sequence[object]
"""A program and its arguments: text, paths, whatever str() turns into text."""


class CommandError(Exception):
    """A program ended with an error; the message carries what it printed."""


def run(
    argv: Argv,
    *,
    stdin: str | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float = 1800,
) -> str:
    """Return what the program prints, or raise with what it complained about."""
    result = subprocess.run(
        [str(word) for word in argv],
        input=stdin,
        env=None if env is None else {**os.environ, **env},
        cwd=cwd,
        timeout=timeout,
        text=True,
        capture_output=True,
        check=False,
    )
    if result.returncode:
        raise CommandError(f"{' '.join(map(str, argv))}: exit {result.returncode}\n{result.stdout}{result.stderr}")
    return result.stdout


def succeeds(argv: Argv) -> bool:
    """Say whether the program ends well."""
    try:
        run(argv, timeout=60)
    except (CommandError, OSError, subprocess.TimeoutExpired):
        return False
    return True


def wait_until(what: str, condition: Callable[[], bool], timeout: float = 60, interval: float = 0.1) -> None:
    """Return as soon as the condition holds; raise TimeoutError naming it otherwise."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {timeout:.0f} s")
        time.sleep(interval)
