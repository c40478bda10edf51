"""SIGTERM: a step under way is finished, everything else stops at once."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Final

from qlora_api.names import GRACE_SECONDS
from qlora_api.reasons import Reason
from qlora_trainer.errors import RunError, as_run_error

SIGTERM_EXIT_CODE: Final = 143
"""What a shell calls a process ended by SIGTERM: 128 + 15."""
_STOP_TIMEOUT_SECONDS: Final = GRACE_SECONDS - 10.0
"""A step or an upload that is still under way then is abandoned; the rest is for the last word."""


def interrupted_error(step: int | None = None) -> RunError:
    """Return what is raised once the process was asked to stop."""
    return RunError(Reason.INTERRUPTED, "the pod was asked to stop before the run was published", step)


def as_exit_error(error: BaseException, *, stopped: bool) -> RunError:
    """Say what ended a run: a library that meets the stop in its own work wraps it in an error of its own."""
    known = as_run_error(error)
    return interrupted_error(known.step) if stopped and known.reason is Reason.TRAINER_ERROR else known


class StopFlag:
    """Whether this process was asked to stop."""

    def __init__(self) -> None:
        self.requested = False
        self._deferred = False

    def install_signal_handlers(self, on_timeout: Callable[[], None]) -> None:
        """React to SIGTERM; `overdue` is called from a thread when nothing stopped in time, before the process ends."""
        self._on_timeout = on_timeout
        signal.signal(signal.SIGTERM, self._on_signal)

    @contextlib.contextmanager
    def handling_keyboard_interrupt(self, announce: Callable[[], None]) -> Iterator[None]:
        """Within, the first Ctrl-C lets a step under way finish and is announced; another one ends everything."""

        def on_signal(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 (signal's signature)
            if self.requested or not self._deferred:
                raise KeyboardInterrupt
            self.requested = True
            announce()

        before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Within, a signal only raises the flag."""
        before, self._deferred = self._deferred, True
        try:
            yield
        finally:
            self._deferred = before

    @contextlib.contextmanager
    def delayed(self) -> Iterator[None]:
        """Within, a signal waits: it comes at the end of what is not to be done by halves."""
        if self._deferred or threading.current_thread() is not threading.main_thread():  # the thread that hears signals
            yield
            return
        before = self.requested
        with self.deferred():
            yield
        if self.requested and not before:
            raise interrupted_error()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 (signal's signature)
        if self.requested:
            return
        self.requested = True
        timer = threading.Timer(_STOP_TIMEOUT_SECONDS, self._exit_on_timeout)
        timer.daemon = True
        timer.start()
        if not self._deferred:
            raise interrupted_error()

    def _exit_on_timeout(self) -> None:
        self._on_timeout()
        os._exit(SIGTERM_EXIT_CODE)
