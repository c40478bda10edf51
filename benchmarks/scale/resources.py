"""Resource usage of a process, as the kernel counts it."""

import os
from dataclasses import dataclass
from pathlib import Path

MIB = 2**20


@dataclass(frozen=True)
class Usage:
    """Memory and CPU time of one process."""

    peak_mib: float
    """Peak resident memory (VmHWM)."""
    cpu_seconds: float


def usage_of(pid: int) -> Usage:
    """Return the usage of a running process so far."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    ticks = int(fields[11]) + int(fields[12])
    return Usage(int(status["VmHWM"].split()[0]) * 1024 / MIB, ticks / os.sysconf("SC_CLK_TCK"))
