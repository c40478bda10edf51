"""SIGTERM and Ctrl-C: the current step finishes, everything else stops immediately."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Final

from qlora_api.names import GRACE_SECONDS
from qlora_api.reasons import Reason
from qlora_trainer.errors import RunError, StopRequested, as_run_error, interrupted_error

SIGTERM_EXIT_CODE: Final = 143
"""A shell's exit code for a process ended by SIGTERM: 128 + 15."""
_STOP_TIMEOUT_SECONDS: Final = GRACE_SECONDS - 10.0
"""A step or upload that still runs after this time is abandoned; the rest is for the termination message."""


def as_exit_error(error: BaseException, *, stopped: bool) -> RunError:
    """Return the cause of an exit; after a stop, unknown errors are Interrupted: a library may wrap the stop in one."""
    known = interrupted_error() if isinstance(error, StopRequested) else as_run_error(error)
    return interrupted_error(known.step) if stopped and known.reason is Reason.TRAINER_ERROR else known


class StopFlag:
    """Stop request of this process, set by signals."""

    def __init__(self) -> None:
        self.requested = False
        self._deferred = False

    def install_signal_handlers(self, on_timeout: Callable[[], None]) -> None:
        """Handle SIGTERM; `on_timeout` runs in a thread before the process exits if nothing stopped in time."""
        self._on_timeout = on_timeout
        signal.signal(signal.SIGTERM, self._on_signal)

    @contextlib.contextmanager
    def handling_keyboard_interrupt(self, announce: Callable[[], None]) -> Iterator[None]:
        """Within the block, the first Ctrl-C lets the step finish and calls `announce`; the second one aborts."""

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
        """Within the block, a signal only sets the flag."""
        before, self._deferred = self._deferred, True
        try:
            yield
        finally:
            self._deferred = before

    @contextlib.contextmanager
    def delayed(self) -> Iterator[None]:
        """Delay signals until the end of the block, which must not be interrupted halfway."""
        if self._deferred or threading.current_thread() is not threading.main_thread():  # which gets signals
            yield
            return
        before = self.requested
        with self.deferred():
            yield
        if self.requested and not before:
            raise StopRequested

    def _on_signal(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 (signal's signature)
        if self.requested:
            return
        self.requested = True
        timer = threading.Timer(_STOP_TIMEOUT_SECONDS, self._exit_on_timeout)
        timer.daemon = True
        timer.start()
        if not self._deferred:
            raise StopRequested

    def _exit_on_timeout(self) -> None:
        self._on_timeout()
        os._exit(SIGTERM_EXIT_CODE)
