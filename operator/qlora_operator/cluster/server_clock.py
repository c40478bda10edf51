"""The time of the API server, whatever the operator's own clock says.

Deadlines count from times that the control plane wrote. An operator whose clock is half an hour ahead would fail every
run before it starts; one whose clock is behind would leave a GPU to a pod that never starts.
"""

import logging
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Final, NamedTuple

_log = logging.getLogger(__name__)

TOLERANCE: Final = timedelta(seconds=5)
"""A smaller skew affects no deadline, and the Date header has a resolution of one second."""
WINDOW: Final = 5
"""Answers that are remembered; their median is used."""
AGREEING: Final = 3
"""Answers that must agree: one of them may be a proxy's, or of the one API server whose clock is wrong."""
MAX_STEP: Final = timedelta(minutes=5)
"""Largest change per answer once the clocks have been compared: shorter than every default deadline, so that none is
judged before the next answers can contradict."""


def utc_now() -> datetime:
    """Return the local time, timezone-aware."""
    return datetime.now(UTC)


class _Answer(NamedTuple):
    """One Date header, compared with the local clock."""

    date: datetime
    ahead: timedelta
    """How far the local clock is ahead."""
    tolerance: timedelta


class ServerClock:
    """The local clock, corrected by the Date headers of the API server's responses, if several of them agree."""

    def __init__(self, local: Callable[[], datetime] = utc_now) -> None:
        self._local = local
        self._skew = timedelta(0)
        self._answers: deque[_Answer] = deque(maxlen=WINDOW)
        self._compared = False

    def now(self) -> datetime:
        """Return the corrected time, timezone-aware."""
        return self._local() - self._skew

    def on_server_date(self, date: str, took: float) -> None:
        """Note the Date header (RFC 9110) of a successful response that has just arrived.

        Args:
            date: The header; one that is missing or malformed is ignored.
            took: Duration of the call in seconds; the response was dated at some time within it.

        """
        half = timedelta(seconds=took / 2)
        try:
            dated = parsedate_to_datetime(date)
            ahead = self._local() - half - dated
        except (TypeError, ValueError):
            return
        if self._answers and self._answers[-1].date == dated:
            return  # of the same second, or cached: it confirms nothing
        self._answers.append(_Answer(dated, ahead, TOLERANCE + half))
        middle = sorted(self._answers, key=lambda answer: answer.ahead)[len(self._answers) // 2]
        agreeing = sum(
            abs(answer.ahead - middle.ahead) < max(answer.tolerance, middle.tolerance) for answer in self._answers
        )
        if agreeing >= AGREEING:
            self._follow(middle)

    @property
    def in_doubt(self) -> bool:
        """Return whether the last answer contradicts the local clock, and no others have confirmed or refuted it."""
        last = self._answers[-1] if self._answers else None
        return not self._compared and last is not None and abs(last.ahead) >= last.tolerance

    def _follow(self, answer: _Answer) -> None:
        """Correct the skew; at first at once, later in steps."""
        first, self._compared = not self._compared, True
        if abs(answer.ahead - self._skew) < answer.tolerance:
            return
        change = (answer.ahead if abs(answer.ahead) >= answer.tolerance else timedelta(0)) - self._skew
        self._skew += change if first else min(max(change, -MAX_STEP), MAX_STEP)
        seconds = self._skew.total_seconds()
        _log.warning("local clock is %+.0f s off the API server's; using the API server's time", seconds)
