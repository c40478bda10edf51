"""Removing what a crashed node leaves: processes of containers and mounts."""

import os
import shutil
import signal
from pathlib import Path

from tests.cluster.host.commands import run, succeeds, wait_until
from tests.cluster.host.processes import ProcessId


def remove_folder(folder: Path) -> None:
    """Remove a folder after unmounting everything below it; never through a mount into somebody's data."""
    for mount in mounts_below(folder):
        if not succeeds(["umount", mount]):
            run(["umount", "--lazy", mount])
    if remaining := mounts_below(folder):
        raise RuntimeError(f"still mounted, not removed: {', '.join(remaining)}")
    if folder.exists():
        shutil.rmtree(folder)


def mounts_below(folder: Path) -> list[str]:
    """Return the mount points under a folder, innermost first."""
    points = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    return [point for point in reversed(points) if point.startswith(f"{folder}/")]


def kill_containers(socket: Path) -> None:
    """Kill the shims that belong to a containerd socket, and everything that they run."""
    shims = [pid for pid in all_processes() if str(socket) in command_line(pid) and "shim" in command_line(pid)]
    doomed = [ProcessId.of(pid) for shim in shims for pid in [*descendants(shim), shim]]
    for process in doomed:
        process.kill(signal.SIGKILL)
    wait_until("end of the containers", lambda: not any(process.alive() for process in doomed), timeout=20)


def all_processes() -> list[int]:
    """Return the numbers of the processes that exist."""
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]  # noqa: PTH208  plain names are wanted


def command_line(pid: int) -> str:
    """Return a process's command line, empty when it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def parent(pid: int) -> int:
    """Return the parent of a process, zero when it has ended."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def descendants(pid: int) -> list[int]:
    """Return the children of a process and theirs."""
    children = [each for each in all_processes() if parent(each) == pid]
    return [*children, *(below for child in children for below in descendants(child))]
