"""Parses the times of the API server."""

from datetime import UTC, datetime
from typing import Final

_EARLIEST: Final = datetime(1970, 1, 1, tzinfo=UTC)
_LATEST: Final = datetime(9000, 1, 1, tzinfo=UTC)
"""Bounds of a time that was read, so that adding a duration to it cannot overflow."""


def parse_time(text: str | None) -> datetime | None:
    """Parse an RFC 3339 time, which has a time zone."""
    return bounded_time(text) if text else None


def bounded_time(text: str) -> datetime:
    """Parse a time that is there."""
    return min(max(datetime.fromisoformat(text), _EARLIEST), _LATEST)
