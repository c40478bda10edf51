"""Heartbeat of this process: long-running work ticks it, and the watchdog detects when the ticks stop."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Final


class Liveness:
    """Time since the last heartbeat tick."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._pauses = 0
        self._last_tick = clock()

    def tick(self) -> None:
        """Record progress: a forward pass, a generated token, a part of an upload or download."""
        self._last_tick = self._clock()

    def seconds_silent(self) -> float:
        """Return the seconds since the last tick; 0 while paused."""
        return 0.0 if self._pauses else self._clock() - self._last_tick

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Suspend the check within the block, which waits for a rank with its own watchdog, or for a library."""
        self._pauses += 1
        try:
            yield
        finally:
            self.tick()
            self._pauses -= 1


LIVENESS: Final = Liveness()
"""Shared by all parts of this process."""
