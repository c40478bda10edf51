"""The proof that the watch delivers."""

import pytest

from qlora_operator.controller.watch_health import OVERDUE_SECONDS, WatchHealth
from tests.make import REF


class Clock:
    """A clock that tests move."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_missing_event_is_overdue(clock: Clock) -> None:
    proof = WatchHealth(clock)
    proof.expect_version(REF, "10")
    assert proof.overdue() == ()
    clock.now = OVERDUE_SECONDS + 1
    assert proof.overdue() == (REF,)


@pytest.mark.parametrize("version", ["10", "11"])
def test_later_version_satisfies_expectation(clock: Clock, version: str) -> None:
    proof = WatchHealth(clock)
    proof.expect_version(REF, "10")
    proof.on_event(REF, version)
    clock.now = OVERDUE_SECONDS + 1
    assert proof.overdue() == ()


def test_event_before_write_response_counts(clock: Clock) -> None:
    proof = WatchHealth(clock)
    proof.on_event(REF, "10")
    proof.expect_version(REF, "10")
    clock.now = OVERDUE_SECONDS + 1
    assert proof.overdue() == ()


def test_repeated_old_event_keeps_newest_version(clock: Clock) -> None:
    proof = WatchHealth(clock)
    proof.on_event(REF, "10")
    proof.on_event(REF, "7")
    proof.expect_version(REF, "10")
    clock.now = OVERDUE_SECONDS + 1
    assert proof.overdue() == ()


def test_has_newer_version(clock: Clock) -> None:
    proof = WatchHealth(clock)
    assert not proof.has_newer_version(REF, "10")
    proof.on_event(REF, "10")
    assert not proof.has_newer_version(REF, "10")
    assert proof.has_newer_version(REF, "7")
    proof.expect_version(REF, "20")
    assert proof.has_newer_version(REF, "15")
    assert not proof.has_newer_version(REF, "20")


def test_further_writes_do_not_reset_the_clock(clock: Clock) -> None:
    proof = WatchHealth(clock)
    for second in range(0, int(OVERDUE_SECONDS) + 2, 10):
        clock.now = float(second)
        proof.expect_version(REF, str(second))
    clock.now = OVERDUE_SECONDS + 1
    assert proof.overdue() == (REF,)


def test_deleted_job_expects_no_event(clock: Clock) -> None:
    proof = WatchHealth(clock)
    proof.expect_version(REF, "10")
    proof.forget(REF)
    clock.now = OVERDUE_SECONDS + 1
    assert proof.overdue() == ()


def test_deletion_during_a_list_is_not_expected_again(clock: Clock) -> None:
    proof = WatchHealth(clock)
    proof.on_event(REF, "10")
    before = proof.known_versions("")
    proof.on_delete(REF, "11")
    assert proof.on_list(before, {REF: "10"}) == set()
    clock.now = OVERDUE_SECONDS + 1
    assert proof.overdue() == ()


def test_job_that_a_later_list_lacks_is_dropped(clock: Clock) -> None:
    proof = WatchHealth(clock)
    proof.expect_version(REF, "10")
    assert proof.on_list(proof.known_versions(""), {}) == {REF}
    clock.now = OVERDUE_SECONDS + 1
    assert proof.overdue() == ()


def test_job_written_during_a_list_that_lacks_it_is_kept(clock: Clock) -> None:
    proof = WatchHealth(clock)
    before = proof.known_versions("")
    proof.expect_version(REF, "10")
    assert proof.on_list(before, {}) == set()
    clock.now = OVERDUE_SECONDS + 1
    assert proof.overdue() == (REF,)


def test_list_of_another_namespace_drops_nothing(clock: Clock) -> None:
    proof = WatchHealth(clock)
    proof.expect_version(REF, "10")
    assert proof.on_list(proof.known_versions("other"), {}) == set()


def test_version_written_before_a_deletion_is_not_expected(clock: Clock) -> None:
    proof = WatchHealth(clock)
    proof.on_delete(REF, "11")
    proof.expect_version(REF, "10")
    clock.now = OVERDUE_SECONDS + 1
    assert proof.overdue() == ()
