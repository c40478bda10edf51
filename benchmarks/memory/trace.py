"""Bytes of torch's CPU allocator over time, from the profiler's events of every block."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from torch.profiler import ProfilerActivity, profile


@dataclass
class Trace:
    """Allocations and frees in order; bytes count from the start of the trace."""

    events: list[Any] = field(default_factory=list)

    @property
    def left(self) -> int:
        """Return the bytes allocated and not freed since the start."""
        return sum(self._sizes)

    @property
    def peak(self) -> int:
        """Return the peak of bytes above the start."""
        return max(accumulate(self._sizes, initial=0))

    @property
    def _sizes(self) -> list[int]:
        return [int(event.nbytes()) for event in self.events if event.name() == "[memory]"]


@contextmanager
def traced() -> Iterator[Trace]:
    """Trace the code in the context; the trace is complete when it exits."""
    trace = Trace()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield trace
    trace.events += sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
