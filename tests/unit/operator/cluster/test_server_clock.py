"""The API server's time, by what its answers say and a clock that tests set."""

from datetime import datetime, timedelta
from email.utils import format_datetime

import pytest

from qlora_operator.cluster.server_clock import ServerClock
from tests.make import NOW


class LocalClock:
    """This machine's clock."""

    def __init__(self, skew: timedelta) -> None:
        self.now: datetime = NOW + skew

    def __call__(self) -> datetime:
        return self.now


def answer_at(time: datetime) -> str:
    return format_datetime(time, usegmt=True)


@pytest.mark.parametrize("minutes", [-30, 5, 60 * 24 * 365])
def test_api_server_time_is_used(minutes: int) -> None:
    clock = ServerClock(LocalClock(timedelta(minutes=minutes)))
    clock.on_server_date(answer_at(NOW), 0.0)
    assert clock.now() == NOW


@pytest.mark.parametrize("seconds", [-4, 0, 4])
def test_small_skew_is_ignored(seconds: int) -> None:
    clock = ServerClock(LocalClock(timedelta(seconds=seconds)))
    clock.on_server_date(answer_at(NOW), 0.0)
    assert clock.now() == NOW + timedelta(seconds=seconds)


@pytest.mark.parametrize("dated_after", [0, 10, 20])
def test_slow_response_widens_tolerance(dated_after: int) -> None:
    local = LocalClock(timedelta(seconds=20))
    clock = ServerClock(local)
    clock.on_server_date(answer_at(NOW + timedelta(seconds=dated_after)), 20.0)
    assert clock.now() == local.now


def test_small_changes_of_skew_are_ignored() -> None:
    local = LocalClock(timedelta(minutes=5))
    clock = ServerClock(local)
    clock.on_server_date(answer_at(NOW), 0.0)
    local.now += timedelta(seconds=13)
    clock.on_server_date(answer_at(NOW + timedelta(seconds=10)), 0.0)
    assert clock.now() == NOW + timedelta(seconds=13)


def test_corrected_clock_resets_skew() -> None:
    local = LocalClock(timedelta(minutes=5))
    clock = ServerClock(local)
    clock.on_server_date(answer_at(NOW), 0.0)
    local.now = NOW + timedelta(seconds=1)
    clock.on_server_date(answer_at(NOW), 0.0)
    assert clock.now() == NOW + timedelta(seconds=1)


@pytest.mark.parametrize("date", ["", "soon", "Sun, 32 Nov 2026 00:00:00 GMT", "Sun, 29 Nov 2026 00:00:00 -0000"])
def test_unreadable_date_is_ignored(date: str) -> None:
    clock = ServerClock(LocalClock(timedelta(minutes=5)))
    clock.on_server_date(date, 0.0)
    assert clock.now() == NOW + timedelta(minutes=5)
