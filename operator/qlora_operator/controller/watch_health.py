"""Health of the watch: every resourceVersion that was written or listed must arrive as an event.

A watch can stall without an error; the operator then appears healthy and does nothing. The operator's own status
writes and the periodic resync show which versions exist, and the watch has to catch up with them.
"""

from collections.abc import Callable, Mapping
from typing import Final

from qlora_api.job_ref import JobRef

OVERDUE_SECONDS: Final = 120.0
"""Bookmarks of the API server arrive every minute, and kopf reconnects a silent stream after 70 seconds."""


Versions = Mapping[JobRef, int]
"""The newest known version of each QLoRAJob of a namespace."""


class WatchHealth:
    """Compares the versions that exist with those that arrived as events."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._received: dict[JobRef, int] = {}
        self._expected: dict[JobRef, tuple[int, float]] = {}

    def on_event(self, ref: JobRef, version: str) -> None:
        """Record that an event with this version arrived; a repeated older event changes nothing."""
        self._received[ref] = max(int(version), self._received.get(ref, -1))
        expected = self._expected.get(ref)
        if expected is not None and expected[0] <= int(version):
            del self._expected[ref]

    def on_delete(self, ref: JobRef, version: str) -> None:
        """Record a deletion; its version is kept, since a list or a write from before may be answered later."""
        self.on_event(ref, version)
        self.forget(ref)

    def has_newer_version(self, ref: JobRef, version: str) -> bool:
        """Return whether a newer version was written, listed or received."""
        return int(version) < self._newest(ref)

    def forget(self, ref: JobRef) -> None:
        """Expect nothing of a QLoRAJob that does not exist."""
        self._expected.pop(ref, None)

    def expect_version(self, ref: JobRef, version: str) -> None:
        """Record that a version exists; its event may not have arrived yet."""
        if self._received.get(ref, -1) >= int(version):
            return
        since = self._expected[ref][1] if ref in self._expected else self._clock()
        self._expected[ref] = (int(version), since)

    def known_versions(self, namespace: str) -> Versions:
        """Return what is known of a namespace (empty: of all), to compare a list with that starts now."""
        refs = self._received.keys() | self._expected.keys()
        return {ref: self._newest(ref) for ref in refs if namespace in {"", ref.namespace}}

    def on_list(self, before: Versions, listed: Mapping[JobRef, str]) -> set[JobRef]:
        """Expect every version of a complete list, and drop what does not exist; return the latter.

        A QLoRAJob that was known before the list started, has not changed since, and is not in it, has been deleted.

        Args:
            before: What `known_versions` returned before the list started.
            listed: The resourceVersion of each QLoRAJob in the list.

        """
        gone = {ref for ref, version in before.items() if ref not in listed and self._newest(ref) == version}
        for ref in gone:
            self._received.pop(ref, None)
            self._expected.pop(ref, None)
        for ref, version in listed.items():
            self.expect_version(ref, version)
        return gone

    def overdue(self) -> tuple[JobRef, ...]:
        """Return the QLoRAJobs whose events are overdue."""
        limit = self._clock() - OVERDUE_SECONDS
        return tuple(ref for ref, (_, since) in self._expected.items() if since < limit)

    def _newest(self, ref: JobRef) -> int:
        expected, _ = self._expected.get(ref, (-1, 0.0))
        return max(self._received.get(ref, -1), expected)
