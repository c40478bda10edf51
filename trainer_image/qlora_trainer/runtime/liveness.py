"""The sign of life of this process: who does a piece of work gives it, and the watchdog misses it."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Final


class Liveness:
    """When the last sign of life was."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._pauses = 0
        self._last_tick = clock()

    def tick(self) -> None:
        """Give a sign: a pass through the model, a token of an answer, a part of an upload or of a download."""
        self._last_tick = self._clock()

    def seconds_silent(self) -> float:
        """Return the seconds without a sign; none while the process rests."""
        return 0.0 if self._pauses else self._clock() - self._last_tick

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within, silence is no fault: this process waits for one that is watched itself, or for a library."""
        self._pauses += 1
        try:
            yield
        finally:
            self.tick()
            self._pauses -= 1


LIVENESS: Final = Liveness()
"""This process's: there is one life, whatever part of it works."""
