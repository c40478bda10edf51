"""Limits of the process that renders chat templates, which are programs of somebody else."""

import contextlib
import resource
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

MIB: Final = 1024 * 1024
CPU_SECONDS: Final = 3.0
"""CPU time of one rendering: three seconds for a text that takes milliseconds."""
_SECONDS_PER_RENDERING: Final = 0.005
"""Added to the budget by each rendering: ten times what a template of a hub's model takes for a short conversation."""
_SECONDS_PER_MIB: Final = 0.5
"""Added for each MiB that is rendered, of a multiple of the row: templates read a text several times."""
ROW_SECONDS: Final = 60.0
"""CPU time of all renderings of a row, and of what finds its answers in them."""
MEMORY_BYTES: Final = 1024 * MIB
"""On top of what the interpreter takes, and of a multiple of the rows."""
TEXT_CHARACTERS: Final = 32_000_000
"""Rendered for a batch of at most 1,000 rows, on top of a multiple of the rows: 32,000 of fixed text for each."""
_MEMORY_PER_BYTE: Final = 8
"""Rows as bytes, as objects, as text and as the answer; up to four bytes per character."""
TEXT_PER_BYTE: Final = 8
"""Rendered characters for each byte of a row: its text, its prompt, and a list of tools that is repeated."""

PARTS_CHARACTERS: Final = 32_000
PARTS_PER_BYTE: Final = 64
"""Rendered for each byte of a row that becomes several: 120 answers, each with half of the row before it on average."""


@dataclass
class CpuBudget:
    """CPU time that is left, as a token bucket: one rendering may be slow, but not all. The kernel ends the process.

    CPU time, because a template cannot wait for anything, and a busy machine must not end an honest one.
    """

    left: float = CPU_SECONDS
    enabled: bool = False
    """Only in the child process: SIGPROF and SIGVTALRM end the process."""
    row_bytes: int = 0
    """Size of the row, as text beyond a multiple of it is the template's own."""

    @contextlib.contextmanager
    def one_row(self, size: int) -> Iterator[None]:
        """Count down while a row is rendered as often as it has answers and fields."""
        self.row_bytes = size
        if not self.enabled:
            yield
            return
        signal.setitimer(signal.ITIMER_VIRTUAL, ROW_SECONDS)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)

    @contextlib.contextmanager
    def spending(self) -> Iterator[None]:
        """Count down while a template runs."""
        if not self.enabled:
            yield
            return
        signal.setitimer(signal.ITIMER_PROF, self.left)
        try:
            yield
        finally:
            remaining, _ = signal.setitimer(signal.ITIMER_PROF, 0)
            self.add(remaining - self.left + _SECONDS_PER_RENDERING)

    def add(self, seconds: float) -> None:
        """Add to what is left, up to the time of one rendering."""
        self.left = min(self.left + seconds, CPU_SECONDS)

    def add_for_text(self, text: str) -> None:
        """Add what rendering a text of this length may take."""
        self.add(min(len(text), TEXT_PER_BYTE * self.row_bytes) / MIB * _SECONDS_PER_MIB)


CPU_BUDGET: Final = CpuBudget()


def limit_process() -> int:
    """Limit this process for good: it writes no file and dumps no core. Return the bytes that it has mapped."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    for alarm in (signal.SIGPROF, signal.SIGVTALRM):
        signal.signal(alarm, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {alarm})
    CPU_BUDGET.enabled = True
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[0]) * resource.getpagesize() if status.is_file() else 0


def limit_memory(mapped: int, size: int) -> None:
    """Limit the memory while rows of a size are rendered; macOS has no such limit."""
    if mapped:
        limit = mapped + MEMORY_BYTES + _MEMORY_PER_BYTE * size
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
