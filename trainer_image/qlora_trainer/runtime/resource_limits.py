"""Memory and time that reading foreign data may take, so that a bomb is an error and not the end of the pod."""

import contextlib
import queue
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NoReturn, TypeVar, cast

from qlora_api.units import MIB

_Result = TypeVar("_Result")

_STATM: Final = Path("/proc/self/statm")
_RESIDENT_FIELD: Final = 1
_DATA_FIELD: Final = 5
"""Field of statm with the pages that RLIMIT_DATA counts: private and writable (proc_pid_statm(5), setrlimit(2))."""
_POLL_SECONDS: Final = 0.02
"""Between two checks of the memory, in which a process on one core writes some 40 MiB."""


@contextlib.contextmanager
def memory_limit(size: int) -> Iterator[None]:
    """Let allocations in the block fail with MemoryError once the process has `size` bytes more than at its start."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if not _STATM.is_file():  # macOS has neither the file nor the limit
        yield
        return
    limit = _bytes_of(_DATA_FIELD) + size
    if resource.RLIM_INFINITY not in {soft, hard}:
        limit = min(limit, soft, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _bytes_of(field: int) -> int:
    return int(_STATM.read_text().split()[field]) * resource.getpagesize()


def call_native(call: Callable[[], _Result], seconds: float, size: int) -> _Result:
    """Return what a call of a native library returns, which no signal interrupts and which aborts without memory.

    It runs in a thread, and continues there once it has exceeded a limit: the caller ends the run.

    Raises:
        TimeoutError: It takes more than `seconds`.
        MemoryError: The process grows by more than `size` bytes meanwhile.
        RuntimeError: The library panicked, which Python sees as a BaseException.
        Exception: Whatever else the call raises.

    """
    outcomes: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            outcomes.put((call(), None))
        except BaseException as error:
            outcomes.put((None, error))

    watched = _STATM.is_file()
    limit = _bytes_of(_RESIDENT_FIELD) + size if watched else 0
    end = time.monotonic() + seconds
    threading.Thread(target=run, name="native", daemon=True).start()
    while True:
        with contextlib.suppress(queue.Empty):
            result, error = outcomes.get(timeout=_POLL_SECONDS)
            break
        if watched and _bytes_of(_RESIDENT_FIELD) > limit:
            raise MemoryError(f"it takes more than {size // MIB:,} MiB of memory")
        if time.monotonic() > end:
            raise TimeoutError(f"it takes more than {seconds:g} s")
    if isinstance(error, Exception):
        raise error
    if error is not None:
        raise RuntimeError(str(error)) from error
    return cast("_Result", result)


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
