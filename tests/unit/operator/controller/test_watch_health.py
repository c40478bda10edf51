"""The proof that the watch delivers."""

import pytest

from qlora_operator.controller.watch_health import OVERDUE_SECONDS, WatchProof
from tests.make import REF


class Clock:
    """A clock that tests move."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_an_event_that_never_comes_is_noticed(clock: Clock) -> None:
    proof = WatchProof(clock)
    proof.expect(REF, "10")
    assert proof.overdue() == ()
    clock.now = OVERDUE_SECONDS + 1
    assert proof.overdue() == (REF,)


@pytest.mark.parametrize("version", ["10", "11"])
def test_this_or_a_later_version_is_enough(clock: Clock, version: str) -> None:
    proof = WatchProof(clock)
    proof.expect(REF, "10")
    proof.saw(REF, version)
    clock.now = OVERDUE_SECONDS + 1
    assert proof.overdue() == ()


def test_an_event_that_came_before_the_answer_counts(clock: Clock) -> None:
    proof = WatchProof(clock)
    proof.saw(REF, "10")
    proof.expect(REF, "10")
    clock.now = OVERDUE_SECONDS + 1
    assert proof.overdue() == ()


def test_an_old_event_that_is_told_again_takes_nothing_back(clock: Clock) -> None:
    proof = WatchProof(clock)
    proof.saw(REF, "10")
    proof.saw(REF, "7")
    proof.expect(REF, "10")
    clock.now = OVERDUE_SECONDS + 1
    assert proof.overdue() == ()


def test_what_was_told_is_compared_with_what_is_known(clock: Clock) -> None:
    proof = WatchProof(clock)
    assert not proof.knows_newer(REF, "10")
    proof.saw(REF, "10")
    assert not proof.knows_newer(REF, "10")
    assert proof.knows_newer(REF, "7")
    proof.expect(REF, "20")
    assert proof.knows_newer(REF, "15")
    assert not proof.knows_newer(REF, "20")


def test_further_writes_do_not_reset_the_clock(clock: Clock) -> None:
    proof = WatchProof(clock)
    for second in range(0, int(OVERDUE_SECONDS) + 2, 10):
        clock.now = float(second)
        proof.expect(REF, str(second))
    clock.now = OVERDUE_SECONDS + 1
    assert proof.overdue() == (REF,)


def test_a_deleted_job_owes_nothing(clock: Clock) -> None:
    proof = WatchProof(clock)
    proof.expect(REF, "10")
    proof.forget(REF)
    clock.now = OVERDUE_SECONDS + 1
    assert proof.overdue() == ()
