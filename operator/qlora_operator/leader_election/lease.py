"""Who leads, told from a Lease: the rules of Kubernetes's own leader election, without any I/O.

Clocks of two replicas are never compared. A replica that waits measures, by its own clock, for how long the record has
not changed; one that leads measures from the moment at which its last renewal was sent.
"""

from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Final

LEASE_DURATION: Final = timedelta(seconds=12)
"""A record that has not changed for so long may be taken: a dead leader is followed within 16 seconds."""
RENEW_DEADLINE: Final = timedelta(seconds=8)
"""A leader that has not renewed for so long ends its process, while the record is still its own."""
RETRY_PERIOD: Final = timedelta(seconds=2)
"""Between two renewals of a leader, and between two looks of a replica that waits."""
RELEASED_DURATION: Final = timedelta(seconds=1)
"""Duration in the record of a leader that has left; the API server takes no zero."""


@dataclass(frozen=True)
class Lease:
    """The record that replicas agree by."""

    holder: str = ""
    """Empty when the last leader has left."""
    duration: timedelta = LEASE_DURATION
    acquired_at: datetime | None = None
    renewed_at: datetime | None = None
    transitions: int = 0
    version: str = field(default="", compare=False)
    """The resourceVersion; it changes with labels too, which say nothing about a leader."""


class Candidate:
    """What one replica knows of the record."""

    def __init__(self, identity: str) -> None:
        self.identity = identity
        self._lease: Lease | None = None
        self._changed_at = 0.0

    def observe(self, lease: Lease | None, at: float) -> None:
        """Take note of the record as it was read, or as it was written, at this moment of one's own clock."""
        if lease != self._lease:
            self._changed_at = at
        self._lease = lease

    @property
    def is_leader(self) -> bool:
        """Whether the record names this replica."""
        return self._lease is not None and self._lease.holder == self.identity

    def seconds_until_free(self, at: float) -> float:
        """Return for how many seconds the record still belongs to somebody else."""
        if self._lease is None or self._lease.holder in {"", self.identity}:
            return 0.0
        return max(self._changed_at + self._lease.duration.total_seconds() - at, 0.0)

    def leader_record(self, now: datetime) -> Lease:
        """Return the record that makes this replica the leader, or keeps it so."""
        before = self._lease or Lease()
        renewed = replace(before, holder=self.identity, duration=LEASE_DURATION, renewed_at=now)
        if self.is_leader:
            return renewed
        return replace(renewed, acquired_at=now, transitions=before.transitions + (self._lease is not None))

    def released_record(self, now: datetime) -> Lease:
        """Return the record of which the next replica need not wait for the end."""
        return replace(self._lease or Lease(), holder="", duration=RELEASED_DURATION, renewed_at=now)
