"""A session at a terminal: each command as it was typed and all that it printed, in time, as an asciicast."""

import codecs
import fcntl
import json
import os
import pty
import shlex
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from tests.cluster.host.commands import CommandError
from tests.cluster.programs.binaries import binary

COLUMNS: Final = 110
ROWS: Final = 32
LONGEST_PAUSE: Final = 2.0
"""Seconds that a player waits at most: images start, and models load."""


class Recording:
    """Commands in a terminal of their own, in a folder that has the repository's charts and examples."""

    def __init__(self, cast: Path, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder = folder
        self._cast = cast
        programs = {str(binary("kubectl").parent), str(binary("helm").parent), str(Path(sys.executable).parent)}
        path = os.pathsep.join([*sorted(programs), os.environ["PATH"]])
        terminal = {"TERM": "xterm-256color", "COLUMNS": str(COLUMNS), "LINES": str(ROWS)}
        self._environment = {**os.environ, **environment, **terminal, "PATH": path}
        self._started = time.monotonic()
        header = {"version": 2, "width": COLUMNS, "height": ROWS, "idle_time_limit": LONGEST_PAUSE}
        cast.parent.mkdir(parents=True, exist_ok=True)
        cast.write_text(json.dumps({**header, "title": "qlora-operator"}) + "\n", encoding="utf-8")

    def run(self, *words: str) -> str:
        """Type a command, wait for its end, and return what it printed; raise CommandError if it fails."""
        self._keep(f"$ {shlex.join(words)}\r\n")
        master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        with subprocess.Popen(
            words,
            cwd=self.folder,
            env=self._environment,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        ) as process:
            os.close(slave)
            printed = "".join(self._keep(text) for text in codecs.iterdecode(_pieces(master), "utf-8"))
        os.close(master)
        if process.returncode:
            raise CommandError(f"{shlex.join(words)}: exit {process.returncode}\n{printed}")
        return printed

    def _keep(self, text: str) -> str:
        moment = round(time.monotonic() - self._started, 3)
        with self._cast.open("a", encoding="utf-8") as file:
            file.write(json.dumps([moment, "o", text]) + "\n")
        return text


def _pieces(master: int) -> Iterator[bytes]:
    """Yield the output of a terminal until its last program has closed it."""
    while True:
        try:
            piece = os.read(master, 1 << 16)
        except OSError:  # Linux says EIO, not an empty read, when nobody has the other end open
            return
        if not piece:
            return
        yield piece
