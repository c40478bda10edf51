"""When to reconcile a QLoRAJob again: the only place that turns a moment into a delay, so that none is in the past."""

from datetime import datetime, timedelta
from typing import Final

MIN_DELAY: Final = timedelta(seconds=1)
"""Delay after a reconcile that changed nothing; without one, it would be repeated without end."""
MAX_OVERDUE_DELAY: Final = timedelta(minutes=5)
"""Longest delay for a moment that has passed without effect."""


def requeue_delay(now: datetime, at: datetime | None, after: timedelta | None, *, progressed: bool) -> timedelta | None:
    """Return the delay until the next reconcile; None: wait for an event.

    A moment that has passed should have changed something. If it did not, the delay is as long as it is overdue, so
    that it grows with each reconcile.

    Args:
        now: The time of this reconcile.
        at: When something changes without an event.
        after: A fixed delay, such as none after a step that the next one continues.
        progressed: Whether this reconcile wrote anything.

    """
    delays = [delay for delay in (_until(at, now), after) if delay is not None]
    if not delays:
        return None
    return max(min(delays), timedelta(0) if progressed else MIN_DELAY)


def _until(at: datetime | None, now: datetime) -> timedelta | None:
    if at is None or at > now:
        return None if at is None else at - now
    return min(max(now - at, MIN_DELAY), MAX_OVERDUE_DELAY)
