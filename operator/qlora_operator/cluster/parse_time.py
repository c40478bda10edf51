"""Parses the times of the API server."""

from datetime import UTC, datetime
from typing import Final

_EARLIEST: Final = datetime(2014, 6, 6, tzinfo=UTC)
"""First commit of Kubernetes. An earlier time is none, such as 1970 of a container that containerd did not start
(containerd CRI, ContainerStatus), or that of a node without a clock."""
_LATEST: Final = datetime(9000, 1, 1, tzinfo=UTC)
"""Latest time that is read, so that adding a duration to it cannot overflow."""


def parse_time(text: str | None) -> datetime | None:
    """Parse an RFC 3339 time, which has a time zone; None if it is none."""
    moment = datetime.fromisoformat(text) if text else None
    return min(moment, _LATEST) if moment is not None and moment >= _EARLIEST else None


def bounded_time(text: str) -> datetime:
    """Parse a time that is there; one that is none counts as the earliest."""
    return parse_time(text) or _EARLIEST
