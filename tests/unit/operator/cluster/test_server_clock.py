"""The API server's time, by what its answers say and a clock that tests set."""

from datetime import datetime, timedelta
from email.utils import format_datetime

import pytest

from qlora_operator.cluster.server_clock import AGREEING, MAX_STEP, ServerClock
from tests.make import NOW


class LocalClock:
    """This machine's clock."""

    def __init__(self, skew: timedelta) -> None:
        self.now: datetime = NOW + skew

    def __call__(self) -> datetime:
        return self.now


def answer_at(time: datetime) -> str:
    return format_datetime(time, usegmt=True)


def agree(clock: ServerClock, local: LocalClock, server: datetime, took: float = 0.0, answers: int = AGREEING) -> None:
    """Answer once a second, at last with this time of the server."""
    end = local.now
    for second in range(1 - answers, 1):
        local.now = end + timedelta(seconds=second)
        clock.on_server_date(answer_at(server + timedelta(seconds=second)), took)


@pytest.mark.parametrize("minutes", [-30, 5, 60 * 24 * 365])
def test_api_server_time_is_used(minutes: int) -> None:
    local = LocalClock(timedelta(minutes=minutes))
    clock = ServerClock(local)
    agree(clock, local, NOW)
    assert clock.now() == NOW


@pytest.mark.parametrize("seconds", [-4, 0, 4])
def test_small_skew_is_ignored(seconds: int) -> None:
    local = LocalClock(timedelta(seconds=seconds))
    clock = ServerClock(local)
    agree(clock, local, NOW)
    assert clock.now() == NOW + timedelta(seconds=seconds)


@pytest.mark.parametrize("dated_after", [0, 10, 20])
def test_slow_response_widens_tolerance(dated_after: int) -> None:
    local = LocalClock(timedelta(seconds=20))
    clock = ServerClock(local)
    agree(clock, local, NOW + timedelta(seconds=dated_after), 20.0)
    assert clock.now() == local.now


def test_small_changes_of_skew_are_ignored() -> None:
    local = LocalClock(timedelta(minutes=5))
    clock = ServerClock(local)
    agree(clock, local, NOW)
    local.now += timedelta(seconds=13)
    agree(clock, local, NOW + timedelta(seconds=10))
    assert clock.now() == NOW + timedelta(seconds=13)


def test_corrected_clock_resets_skew() -> None:
    local = LocalClock(timedelta(minutes=5))
    clock = ServerClock(local)
    agree(clock, local, NOW)
    local.now = NOW + timedelta(seconds=11)
    agree(clock, local, NOW + timedelta(seconds=10))
    assert clock.now() == NOW + timedelta(seconds=11)


@pytest.mark.parametrize("wrong", [-60, 60, 60 * 24])
def test_one_wrong_answer_moves_nothing(wrong: int) -> None:
    local = LocalClock(timedelta(0))
    clock = ServerClock(local)
    clock.on_server_date(answer_at(NOW + timedelta(minutes=wrong)), 0.0)
    assert clock.now() == NOW
    local.now += timedelta(seconds=5)
    agree(clock, local, local.now)
    clock.on_server_date(answer_at(NOW + timedelta(minutes=wrong)), 0.0)
    assert clock.now() == local.now


def test_one_of_three_servers_with_wrong_clock_moves_nothing() -> None:
    local = LocalClock(timedelta(0))
    clock = ServerClock(local)
    for second in range(60):
        local.now = NOW + timedelta(seconds=second)
        wrong = timedelta(hours=1) if second % 3 == 1 else timedelta(0)
        clock.on_server_date(answer_at(local.now + wrong), 0.0)
        assert clock.now() == local.now


def test_repeated_answer_is_one_answer() -> None:
    """A burst within a second, or an answer from a cache."""
    clock = ServerClock(LocalClock(timedelta(0)))
    for _ in range(10):
        clock.on_server_date(answer_at(NOW + timedelta(hours=1)), 0.0)
    assert clock.now() == NOW


def test_later_jump_is_followed_in_bounded_steps() -> None:
    local = LocalClock(timedelta(0))
    clock = ServerClock(local)
    agree(clock, local, NOW)
    before, moves = clock.now(), []
    for second in range(30):
        local.now = NOW + timedelta(seconds=second)
        clock.on_server_date(answer_at(local.now + timedelta(hours=1)), 0.0)
        moves.append(clock.now() - before)
        before = clock.now()
    assert max(moves) <= MAX_STEP + timedelta(seconds=1)
    assert clock.now() == local.now + timedelta(hours=1)


def test_clock_is_in_doubt_until_answers_agree() -> None:
    local = LocalClock(timedelta(hours=1))
    clock = ServerClock(local)
    assert not clock.in_doubt
    clock.on_server_date(answer_at(NOW), 0.0)
    assert clock.in_doubt
    agree(clock, local, NOW + timedelta(seconds=5))
    assert not clock.in_doubt


@pytest.mark.parametrize("date", ["", "soon", "Sun, 32 Nov 2026 00:00:00 GMT", "Sun, 29 Nov 2026 00:00:00 -0000"])
def test_unreadable_date_is_ignored(date: str) -> None:
    clock = ServerClock(LocalClock(timedelta(minutes=5)))
    clock.on_server_date(date, 0.0)
    assert clock.now() == NOW + timedelta(minutes=5)
