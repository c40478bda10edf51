"""What time it is for the API server, whatever the operator's own clock says.

Deadlines count from times that the control plane wrote. An operator whose clock is half an hour ahead would end every
run before it has started; one that is behind would leave a GPU to a pod that never starts.
"""

import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Final

_log = logging.getLogger(__name__)

TOLERANCE: Final = timedelta(seconds=5)
"""A smaller difference spoils no deadline, and the header has whole seconds."""


def utc_now() -> datetime:
    """Return this machine's time, with its zone."""
    return datetime.now(UTC)


class ServerClock:
    """The clock of this machine, put right by the Date of the API server's answers where it is off."""

    def __init__(self, local: Callable[[], datetime] = utc_now) -> None:
        self._local = local
        self._skew = timedelta(0)

    def now(self) -> datetime:
        """Return the time, with its zone."""
        return self._local() - self._skew

    def on_server_date(self, date: str, took: float) -> None:
        """Compare with the header Date (RFC 9110) of an answer that has just come, and took so many seconds.

        It was dated some time between question and answer. A header that is missing or unreadable tells nothing.
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
        _log.warning("this machine's clock is %+.0f s off the API server's, which counts", seconds)
