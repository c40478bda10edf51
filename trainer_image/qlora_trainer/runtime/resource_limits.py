"""Memory and CPU time that reading foreign data may take, so that a bomb is an error and not the end of the pod."""

import contextlib
import resource
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NoReturn

_STATM: Final = Path("/proc/self/statm")
_DATA_FIELD: Final = 5
"""Field of statm with the pages that RLIMIT_DATA counts: private and writable (proc_pid_statm(5), setrlimit(2))."""


@contextlib.contextmanager
def memory_limit(size: int) -> Iterator[None]:
    """Let allocations in the block fail with MemoryError once the process has `size` bytes more than at its start."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if not _STATM.is_file():  # macOS has neither the file nor the limit
        yield
        return
    limit = _data_bytes() + size
    if resource.RLIM_INFINITY not in {soft, hard}:
        limit = min(limit, soft, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _data_bytes() -> int:
    return int(_STATM.read_text().split()[_DATA_FIELD]) * resource.getpagesize()


@contextlib.contextmanager
def cpu_time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after so much CPU time; only the main thread can be interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: Any) -> NoReturn:
        raise TimeoutError(f"it takes more than {seconds:g} s of CPU time")

    previous = signal.signal(signal.SIGPROF, interrupt)
    # The interval repeats the signal, in case a library catches the first exception.
    signal.setitimer(signal.ITIMER_PROF, seconds, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)
