"""The API server's time, by what its answers say and a clock that tests set."""

from datetime import datetime, timedelta
from email.utils import format_datetime

import pytest

from qlora_operator.cluster.server_clock import ClusterClock
from tests.make import NOW


class Local:
    """This machine's clock."""

    def __init__(self, ahead: timedelta) -> None:
        self.now: datetime = NOW + ahead

    def __call__(self) -> datetime:
        return self.now


def answer_at(time: datetime) -> str:
    return format_datetime(time, usegmt=True)


@pytest.mark.parametrize("minutes", [-30, 5, 60 * 24 * 365])
def test_the_api_servers_time_counts(minutes: int) -> None:
    clock = ClusterClock(Local(timedelta(minutes=minutes)))
    clock.heard(answer_at(NOW), 0.0)
    assert clock.now() == NOW


@pytest.mark.parametrize("seconds", [-4, 0, 4])
def test_a_small_difference_is_none(seconds: int) -> None:
    clock = ClusterClock(Local(timedelta(seconds=seconds)))
    clock.heard(answer_at(NOW), 0.0)
    assert clock.now() == NOW + timedelta(seconds=seconds)


@pytest.mark.parametrize("dated_after", [0, 10, 20])
def test_a_slow_answer_was_dated_at_any_moment_of_its_way(dated_after: int) -> None:
    local = Local(timedelta(seconds=20))
    clock = ClusterClock(local)
    clock.heard(answer_at(NOW + timedelta(seconds=dated_after)), 20.0)
    assert clock.now() == local.now


def test_time_does_not_jitter_with_every_answer() -> None:
    local = Local(timedelta(minutes=5))
    clock = ClusterClock(local)
    clock.heard(answer_at(NOW), 0.0)
    local.now += timedelta(seconds=13)
    clock.heard(answer_at(NOW + timedelta(seconds=10)), 0.0)
    assert clock.now() == NOW + timedelta(seconds=13)


def test_a_clock_that_is_put_right_is_trusted_again() -> None:
    local = Local(timedelta(minutes=5))
    clock = ClusterClock(local)
    clock.heard(answer_at(NOW), 0.0)
    local.now = NOW + timedelta(seconds=1)
    clock.heard(answer_at(NOW), 0.0)
    assert clock.now() == NOW + timedelta(seconds=1)


@pytest.mark.parametrize("date", ["", "soon", "Sun, 32 Nov 2026 00:00:00 GMT", "Sun, 29 Nov 2026 00:00:00 -0000"])
def test_a_date_that_nobody_can_read_tells_nothing(date: str) -> None:
    clock = ClusterClock(Local(timedelta(minutes=5)))
    clock.heard(date, 0.0)
    assert clock.now() == NOW + timedelta(minutes=5)
