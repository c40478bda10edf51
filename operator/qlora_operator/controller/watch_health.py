"""Whether the watch delivers: every version that was written or listed must arrive as an event.

A watch can die without an error, and then an operator looks healthy and does nothing. The operator's own status
writes and the slow listing say which versions exist; the watch has to catch up with them.
"""

from collections.abc import Callable
from typing import Final

from qlora_api.job_ref import JobRef

OVERDUE_SECONDS: Final = 120.0
"""The API server's bookmarks come every minute, and kopf reconnects a silent stream after 70 seconds."""


class WatchHealth:
    """Compares versions that exist with versions that arrived."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._received: dict[JobRef, int] = {}
        self._expected: dict[JobRef, tuple[int, float]] = {}

    def on_event(self, ref: JobRef, version: str) -> None:
        """An event with this version arrived; one that is told again takes nothing back."""
        self._received[ref] = max(int(version), self._received.get(ref, -1))
        expected = self._expected.get(ref)
        if expected is not None and expected[0] <= int(version):
            del self._expected[ref]

    def has_newer_version(self, ref: JobRef, version: str) -> bool:
        """Whether a later version was written, listed or told."""
        expected, _ = self._expected.get(ref, (-1, 0.0))
        return int(version) < max(self._received.get(ref, -1), expected)

    def forget(self, ref: JobRef) -> None:
        """The QLoRAJob is gone."""
        self._received.pop(ref, None)
        self._expected.pop(ref, None)

    def expect_version(self, ref: JobRef, version: str) -> None:
        """A version exists; its event may still be on its way."""
        if self._received.get(ref, -1) >= int(version):
            return
        since = self._expected[ref][1] if ref in self._expected else self._clock()
        self._expected[ref] = (int(version), since)

    def overdue(self) -> tuple[JobRef, ...]:
        """Return whose events should have arrived long ago."""
        limit = self._clock() - OVERDUE_SECONDS
        return tuple(ref for ref, (_, since) in self._expected.items() if since < limit)
