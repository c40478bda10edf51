"""The bytes of torch's CPU allocator over time, from the events that its profiler records for every block."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from torch.profiler import ProfilerActivity, profile


@dataclass
class Trace:
    """What was taken and given back, in order; bytes count from the start of the trace."""

    events: list[Any] = field(default_factory=list)

    @property
    def left(self) -> int:
        """Return the bytes that are there at the end and were not at the start."""
        return sum(self._sizes)

    @property
    def peak(self) -> int:
        """Return the most bytes above the start at any time."""
        return max(accumulate(self._sizes, initial=0))

    @property
    def _sizes(self) -> list[int]:
        return [int(event.nbytes()) for event in self.events if event.name() == "[memory]"]


@contextmanager
def traced() -> Iterator[Trace]:
    """Trace what happens inside; complete once the context is left."""
    trace = Trace()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield trace
    trace.events += sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
