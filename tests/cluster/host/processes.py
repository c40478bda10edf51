"""Long-running programs that outlive the command which started them, remembered on disk."""

import contextlib
import json
import os
import signal
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.host.commands import Argv, wait_until
from tests.cluster.host.paths import ensure_folder


class ProcessDiedError(Exception):
    """A program that should run has ended; the message carries the end of its log."""


@dataclass(frozen=True)
class ProcessId:
    """A process that cannot be mistaken for a later one that was given the same number."""

    pid: int
    started: str

    @classmethod
    def of(cls, pid: int) -> "ProcessId":
        """Identify a process that exists now."""
        return cls(pid, start_time(pid))

    def alive(self) -> bool:
        """Say whether this very process still runs."""
        return self.started != "" and start_time(self.pid) == self.started

    def kill(self, sign: signal.Signals) -> None:
        """Send a signal, unless the process is gone."""
        if self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, sign)


def start_time(pid: int) -> str:
    """Return the kernel's start time of a process, empty when it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


class Processes:
    """The programs of one cluster, each with its log, started in order and stopped in reverse."""

    def __init__(self, folder: Path) -> None:
        self.records = ensure_folder(folder / "processes")
        self.logs = ensure_folder(folder / "logs")
        # Kept so that the interpreter does not complain about children that are meant to outlive it.
        self.children: list[subprocess.Popen[bytes]] = []

    def start(self, name: str, argv: Argv, env: Mapping[str, str] | None = None) -> None:
        """Start a program in a session of its own and remember how."""
        command = [str(word) for word in argv]
        with (self.logs / f"{name}.log").open("ab") as log:
            child = subprocess.Popen(
                command,
                env={**os.environ, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.children.append(child)
        record = {"id": vars(ProcessId.of(child.pid)), "argv": command, "env": dict(env or {})}
        (self.records / f"{name}.json").write_text(json.dumps(record))

    def restart(self, name: str) -> None:
        """Start a program again with the arguments that it had."""
        record = json.loads((self.records / f"{name}.json").read_text())
        self.stop(name)
        self.start(name, record["argv"], record["env"])

    def kill(self, name: str) -> None:
        """End a program at once, as a crash would; restart brings it back."""
        self.identify(name).kill(signal.SIGKILL)
        self.wait_for_end(name)

    def stop(self, name: str) -> None:
        """Ask a program to end, insist after ten seconds, and return when it is gone."""
        process = self.identify(name)
        process.kill(signal.SIGTERM)
        try:
            self.wait_for_end(name, timeout=10)
        except TimeoutError:
            self.kill(name)

    def stop_all(self) -> None:
        """Stop everything, latest first, and forget it."""
        for record in sorted(self.records.glob("*.json"), key=lambda path: path.stat().st_mtime_ns, reverse=True):
            self.stop(record.stem)
            record.unlink()

    def wait_for_end(self, name: str, timeout: float = 30) -> None:
        """Return when the program has ended, and collect it if it is our child."""
        process = self.identify(name)
        wait_until(f"end of {name}", lambda: not process.alive(), timeout, interval=0.02)
        for child in self.children:
            if child.pid == process.pid:
                # Its first thread may be gone, as /proc has it, while others of it still end.
                child.wait(timeout)
            child.poll()

    def identify(self, name: str) -> ProcessId:
        """Return the process that was started last under this name."""
        return ProcessId(**json.loads((self.records / f"{name}.json").read_text())["id"])

    def running(self, name: str) -> bool:
        """Say whether a program was started here and has not ended."""
        return (self.records / f"{name}.json").exists() and self.identify(name).alive()

    def check(self, name: str) -> None:
        """Raise with the end of its log if the program has ended."""
        if not self.running(name):
            raise ProcessDiedError(f"{name} ended:\n{self.tail(name)}")

    def tail(self, name: str, characters: int = 3000) -> str:
        """Return the end of a program's log."""
        return (self.logs / f"{name}.log").read_text(errors="replace")[-characters:]

    def wait_for_port(self, name: str, host: str, port: int, timeout: float = 60) -> None:
        """Return when the program accepts connections; raise as soon as it has died instead."""

        def accepts() -> bool:
            self.check(name)
            with socket.socket() as client:
                client.settimeout(1)
                return client.connect_ex((host, port)) == 0

        wait_until(f"{name} on {host}:{port}", accepts, timeout)
