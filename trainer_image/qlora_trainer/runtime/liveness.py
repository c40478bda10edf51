"""The sign of life of this process: who does a piece of work gives it, and the watchdog misses it."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Final


class Pulse:
    """When the last sign of life was."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._resting = 0
        self._at = clock()

    def beat(self) -> None:
        """Give a sign: a pass through the model, a token of an answer, a part of an upload or of a download."""
        self._at = self._clock()

    def silence(self) -> float:
        """Return the seconds without a sign; none while the process rests."""
        return 0.0 if self._resting else self._clock() - self._at

    @contextlib.contextmanager
    def resting(self) -> Iterator[None]:
        """Within, silence is no fault: this process waits for one that is watched itself, or for a library."""
        self._resting += 1
        try:
            yield
        finally:
            self.beat()
            self._resting -= 1


PULSE: Final = Pulse()
"""This process's: there is one life, whatever part of it works."""
