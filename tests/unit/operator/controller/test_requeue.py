"""No requeue is in the past, whatever the decision says."""

from datetime import datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from qlora_operator.controller.requeue import MAX_OVERDUE_DELAY, MIN_DELAY, requeue_delay
from qlora_operator.models import earliest
from tests.make import NOW

MOMENTS = st.one_of(st.none(), st.timedeltas(timedelta(days=-9), timedelta(days=9)).map(lambda delta: NOW + delta))
DELAYS = st.one_of(st.none(), st.timedeltas(timedelta(0), timedelta(days=9)))


def test_future_moment_is_waited_for() -> None:
    assert requeue_delay(NOW, NOW + timedelta(hours=1), None, progressed=False) == timedelta(hours=1)


def test_overdue_moment_is_checked_ever_later() -> None:
    now, due, checks = NOW, NOW, 0
    while now < NOW + timedelta(days=1):
        delay = requeue_delay(now, due, None, progressed=False)
        assert delay is not None
        now, checks = now + delay, checks + 1
    assert checks < timedelta(days=1) / MAX_OVERDUE_DELAY + 20


def test_step_that_wrote_continues_at_once() -> None:
    assert requeue_delay(NOW, None, timedelta(0), progressed=True) == timedelta(0)
    assert requeue_delay(NOW, None, timedelta(0), progressed=False) == MIN_DELAY


def test_without_moment_an_event_is_waited_for() -> None:
    assert requeue_delay(NOW, None, None, progressed=True) is None


@given(at=MOMENTS, after=DELAYS)
def test_reconcile_that_changed_nothing_is_never_repeated_at_once(at: datetime | None, after: timedelta | None) -> None:
    delay = requeue_delay(NOW, at, after, progressed=False)
    assert delay is None if at is None and after is None else delay is not None and delay >= MIN_DELAY


def test_earliest_ignores_moments_that_have_passed() -> None:
    soon = NOW + timedelta(seconds=1)
    assert earliest(NOW, None, NOW - timedelta(hours=1), NOW, soon, NOW + timedelta(days=1)) == soon
    assert earliest(NOW, None, NOW) is None
