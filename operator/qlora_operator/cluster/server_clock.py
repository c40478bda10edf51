"""The time of the API server, whatever the operator's own clock says.

Deadlines count from times that the control plane wrote. An operator whose clock is half an hour ahead would fail every
run before it starts; one whose clock is behind would leave a GPU to a pod that never starts.
"""

import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Final

_log = logging.getLogger(__name__)

TOLERANCE: Final = timedelta(seconds=5)
"""A smaller skew affects no deadline, and the Date header has a resolution of one second."""


def utc_now() -> datetime:
    """Return the local time, timezone-aware."""
    return datetime.now(UTC)


class ServerClock:
    """The local clock, corrected by the Date header of the API server's responses."""

    def __init__(self, local: Callable[[], datetime] = utc_now) -> None:
        self._local = local
        self._skew = timedelta(0)

    def now(self) -> datetime:
        """Return the corrected time, timezone-aware."""
        return self._local() - self._skew

    def on_server_date(self, date: str, took: float) -> None:
        """Update the skew from the Date header (RFC 9110) of a response that has just arrived.

        Args:
            date: The header; one that is missing or malformed is ignored.
            took: Duration of the call in seconds; the response was dated at some time within it.

        """
        half = timedelta(seconds=took / 2)
        try:
            ahead = self._local() - half - parsedate_to_datetime(date)
        except (TypeError, ValueError):
            return
        tolerance = TOLERANCE + half
        if abs(ahead - self._skew) < tolerance:
            return
        self._skew = ahead if abs(ahead) >= tolerance else timedelta(0)
        seconds = self._skew.total_seconds()
        _log.warning("local clock is %+.0f s off the API server's; using the API server's time", seconds)
