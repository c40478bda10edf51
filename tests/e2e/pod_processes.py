"""Processes of pods, seen from the host that runs the node: found by what they are, signalled, awaited."""

import contextlib
import os
import signal
from collections.abc import Iterable
from pathlib import Path


def read_process(path: Path) -> bytes:
    """Return a file of /proc about a process; empty if it has ended, or may not be read."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return b""


def processes_of(hostname: str) -> list[int]:
    """Ids, on the host, of the processes of a training pod."""
    return [
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/environ")
        if f"HOSTNAME={hostname}".encode() in read_process(path).split(b"\0")
    ]


def alive(processes: Iterable[int]) -> bool:
    """Whether any of them still runs; one that its parent has not waited for does not."""
    states = (read_process(Path(f"/proc/{process}/stat")).rpartition(b")")[2].split()[:1] for process in processes)
    return any(state and state != [b"Z"] for state in states)


def send_signal(processes: Iterable[int], sent: signal.Signals) -> None:
    """Signal each of them that has not ended meanwhile: the first may take others with it."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, sent)
