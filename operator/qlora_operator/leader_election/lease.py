"""Who the leader is according to a Lease: the rules of client-go's leader election, without I/O.

Clocks of two replicas are never compared. A standby replica measures with its own clock for how long the record has
not changed; the leader measures from the moment at which it sent its last renewal.
"""

from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Final

LEASE_DURATION: Final = timedelta(seconds=12)
"""A record that has not changed for so long may be taken: a dead leader is replaced within 16 seconds."""
RENEW_DEADLINE: Final = timedelta(seconds=8)
"""A leader that has not renewed for so long exits, while it still holds the Lease."""
RETRY_PERIOD: Final = timedelta(seconds=2)
"""Interval between renewals of a leader, and between reads of a standby replica."""
RELEASED_DURATION: Final = timedelta(seconds=1)
"""Duration in the record of a leader that has released it; the API server rejects 0."""


@dataclass(frozen=True)
class Lease:
    """The election record."""

    holder: str = ""
    """Empty if the last leader has released it."""
    duration: timedelta = LEASE_DURATION
    acquired_at: datetime | None = None
    renewed_at: datetime | None = None
    transitions: int = 0
    version: str = field(default="", compare=False)
    """The resourceVersion; not compared, since it also changes with labels."""


class Candidate:
    """The election record as one replica observes it."""

    def __init__(self, identity: str) -> None:
        self.identity = identity
        self._lease: Lease | None = None
        self._changed_at = 0.0

    def observe(self, lease: Lease | None, at: float) -> None:
        """Observe the record that was read or written at a time of the replica's own clock, in seconds."""
        if lease != self._lease:
            self._changed_at = at
        self._lease = lease

    @property
    def is_leader(self) -> bool:
        """Return whether the record names this replica."""
        return self._lease is not None and self._lease.holder == self.identity

    def seconds_until_free(self, at: float) -> float:
        """Return for how many seconds another replica still holds the record; 0 if it is free or our own."""
        if self._lease is None or self._lease.holder in {"", self.identity}:
            return 0.0
        return max(self._changed_at + self._lease.duration.total_seconds() - at, 0.0)

    def leader_record(self, now: datetime) -> Lease:
        """Return the record that makes or keeps this replica the leader."""
        previous = self._lease or Lease()
        renewed = replace(previous, holder=self.identity, duration=LEASE_DURATION, renewed_at=now)
        if self.is_leader:
            return renewed
        return replace(renewed, acquired_at=now, transitions=previous.transitions + (self._lease is not None))

    def released_record(self, now: datetime) -> Lease:
        """Return the record that lets the next replica take over at once."""
        return replace(self._lease or Lease(), holder="", duration=RELEASED_DURATION, renewed_at=now)
