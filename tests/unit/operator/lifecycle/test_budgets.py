"""Retry budgets: what each fault domain may spend, what refills it, and what the message says when it is spent."""

from datetime import timedelta
from typing import Any, Final

import pytest

from qlora_api.reasons import NORMAL_REASONS, REASONS, Domain, Reason
from qlora_api.report import UNEXPLAINED_EXIT
from qlora_api.v1alpha1 import Attempt, QLoRAJobStatus
from qlora_operator.lifecycle.budgets import (
    MAX_NODE_ATTEMPTS,
    PATIENCE,
    domain_of,
    find_exhausted,
    pause_after,
    retry_at,
    since_progress,
)
from tests.make import NOW, make_spec

STATUS: Final = QLoRAJobStatus()
OOM, S3, MISSING = Reason.CUDA_OUT_OF_MEMORY, Reason.S3_UNAVAILABLE, Reason.ACCELERATOR_MISSING


def attempts_of(*reasons: Reason, **change: Any) -> tuple[Attempt, ...]:
    return tuple(
        Attempt(number=number, job=f"bot-{number}", reason=reason, finished_at=NOW, **change)
        for number, reason in enumerate(reasons, start=1)
    )


def with_checkpoints(attempts: tuple[Attempt, ...], *steps: int | None) -> tuple[Attempt, ...]:
    return tuple(
        attempt.model_copy(update={"checkpoint_step": step}) for attempt, step in zip(attempts, steps, strict=True)
    )


def exhausted(*attempts: Attempt, **spec: Any) -> tuple[Reason, str] | None:
    found = find_exhausted(make_spec(**spec), STATUS, attempts, NOW)
    return (found.reason, found.message) if found else None


def test_every_failure_has_a_domain() -> None:
    assert {reason for reason, record in REASONS.items() if record.domain is None} == NORMAL_REASONS


def test_run_budget_is_max_attempts() -> None:
    attempts = attempts_of(OOM, S3, Reason.INTERRUPTED, OOM)
    assert exhausted(*attempts, retries={"maxAttempts": 3}) is None
    assert exhausted(*attempts, retries={"maxAttempts": 2}) == (
        Reason.RETRIES_EXHAUSTED,
        "2 of 2 attempts (spec.retries.maxAttempts) failed",
    )


def test_new_checkpoint_refills_budget() -> None:
    attempts = attempts_of(OOM, OOM, OOM)
    assert exhausted(*with_checkpoints(attempts, 10, 20, 30), retries={"maxAttempts": 2}) is None
    assert exhausted(*with_checkpoints(attempts, 10, 20, 20), retries={"maxAttempts": 2}) == (
        Reason.RETRIES_EXHAUSTED,
        "2 of 2 attempts (spec.retries.maxAttempts) failed since the checkpoint of step 20",
    )


def test_older_checkpoint_refills_nothing() -> None:
    attempts = with_checkpoints(attempts_of(OOM, OOM, OOM), 20, None, 10)
    assert [attempt.number for attempt in since_progress(attempts)] == [1, 2, 3]


def test_forgiven_attempts_do_not_count() -> None:
    assert [attempt.number for attempt in since_progress(attempts_of(S3, S3, S3), forgiven=2)] == [3]


@pytest.mark.parametrize(
    "reason",
    [
        Reason.POD_REJECTED,
        Reason.STARTUP_DEADLINE_EXCEEDED,
        Reason.IMAGE_PULL_FAILED,
        Reason.ACCELERATOR_MISSING,
        Reason.ACCELERATOR_FAILED,
        Reason.HEARTBEAT_LOST,
        Reason.COLLECTIVE_TIMEOUT,
        Reason.EVICTED,
    ],
)
def test_node_budget_is_bounded_whatever_max_attempts(reason: Reason) -> None:
    attempts = tuple(
        attempt.model_copy(update={"node": f"gpu-{attempt.number % 2}"})
        for attempt in attempts_of(*[reason] * MAX_NODE_ATTEMPTS)
    )
    assert exhausted(*attempts[:-1], retries={"maxAttempts": 1}) is None
    assert exhausted(*attempts, retries={"maxAttempts": 50}) == (
        Reason.RETRIES_EXHAUSTED,
        "6 attempts failed on gpu-0, gpu-1, the most that nodes may end without a new checkpoint",
    )


@pytest.mark.parametrize(
    ("nodes", "messages", "failed"),
    [
        (("a", "b"), ("ValueError: 7", "ValueError: 8"), True),
        (("a", "a"), ("ValueError: 7", "ValueError: 7"), False),
        (("a", "a", "a"), ("ValueError: 7",) * 3, True),
        (("a", "b"), ("ValueError: 7", "KeyError: 7"), False),
        (("a", "b"), (r"CUDA error: assert\nfor 7", "CUDA error: assert\nfor 8"), True),
        (("a", "b"), (f"pod bot-1-0-abcde exited with code 139 and {UNEXPLAINED_EXIT}",) * 2, False),
        (("a", "b"), (f"the worker processes exited with code -11 and {UNEXPLAINED_EXIT}",) * 2, False),
        (("a", "b", "a"), ("CUDA error: 0x7fab at 5", "KeyError", "CUDA error: 0x7fac at 6"), False),
        (("a", "b", "c"), ("CUDA error: 0x7fab at 5", "KeyError", "CUDA error: 0x7fac at 6"), True),
    ],
)
def test_same_trainer_error_on_two_nodes_fails(nodes: tuple[str, ...], messages: tuple[str, ...], failed: bool) -> None:
    attempts = [
        attempt.model_copy(update={"node": node, "message": message})
        for attempt, node, message in zip(
            attempts_of(*[Reason.TRAINER_ERROR] * len(nodes)), nodes, messages, strict=True
        )
    ]
    found = exhausted(*attempts)
    assert (found is not None and found[0] is Reason.TRAINER_ERROR) == failed


def test_same_hardware_error_on_two_nodes_does_not_fail() -> None:
    attempts = [
        attempt.model_copy(update={"node": node, "message": "ECC"})
        for attempt, node in zip(attempts_of(Reason.ACCELERATOR_FAILED, Reason.ACCELERATOR_FAILED), "ab", strict=True)
    ]
    assert exhausted(*attempts) is None


@pytest.mark.parametrize("reason", [S3, Reason.HUB_UNAVAILABLE, Reason.HUB_RATE_LIMITED, Reason.UPLOAD_FAILED])
def test_service_budget_is_hours_of_pauses(reason: Reason) -> None:
    count = 1
    while exhausted(*attempts_of(*[reason] * count), retries={"maxAttempts": 1}) is None:
        count += 1
    pauses = sum((pause_after(Domain.SERVICE, number) for number in range(1, count)), timedelta(0))
    assert timedelta(hours=5, minutes=45) < pauses <= PATIENCE
    found = exhausted(*attempts_of(*[reason] * count))
    assert found == (
        Reason.RETRIES_EXHAUSTED,
        f"{count} attempts ended with {reason}; the next pause would exceed 6h00m of waiting",
    )


def test_losses_count_not_the_number_of_the_attempt() -> None:
    drained, lost = Reason.INTERRUPTED, Reason.POD_LOST
    assert exhausted(*attempts_of(drained, drained, lost)) is None
    assert exhausted(*attempts_of(lost, drained, lost)) is None
    assert exhausted(*with_checkpoints(attempts_of(lost, lost, lost), 0, 0, 50)) is None
    found = exhausted(*attempts_of(lost, drained, lost, lost))
    assert found is not None
    assert found[0] is lost
    assert found[1].startswith("3 attempts disappeared without a termination message")


def test_dropped_attempts_count_against_total_deadline() -> None:
    status = QLoRAJobStatus.model_validate({"earlierAttempts": {"count": 40, "seconds": 86_400}})
    found = find_exhausted(make_spec(), status, attempts_of(Reason.INTERRUPTED), NOW)
    assert found is not None
    assert found.reason is Reason.DEADLINE_EXCEEDED


@pytest.mark.parametrize(
    ("domain", "seconds"),
    [
        (Domain.RUN, [0, 0, 0, 0, 0, 0, 0]),
        (Domain.NODE, [60, 120, 240, 480, 600, 600, 600]),
        (Domain.SERVICE, [10, 20, 40, 80, 160, 320, 600]),
        (Domain.CLUSTER, [0, 10, 20, 40, 80, 160, 320]),
        (None, [0, 0, 0, 0, 0, 0, 0]),
    ],
)
def test_pauses_double_up_to_minutes(domain: Domain | None, seconds: list[int]) -> None:
    assert [pause_after(domain, count).total_seconds() for count in range(1, 8)] == seconds


def test_repeated_disruptions_back_off_until_progress() -> None:
    drains = attempts_of(*[Reason.INTERRUPTED] * 4)
    assert retry_at(drains[:1]) is None
    assert retry_at(drains) == NOW + timedelta(seconds=40)
    assert retry_at(with_checkpoints(drains, 0, 0, 0, 50)) is None
    assert retry_at(()) is None


def test_domain_of_an_attempt_precedes_that_of_its_reason() -> None:
    (killed,) = attempts_of(Reason.INTERRUPTED, domain=Domain.NODE)
    assert domain_of(killed) is Domain.NODE
    assert domain_of(attempts_of(Reason.INTERRUPTED)[0]) is Domain.CLUSTER
    assert retry_at((killed,)) == NOW + timedelta(minutes=1)


def partly_placed(*runs: str) -> list[timedelta]:
    """Return the pause of each run after a gang of it got only some of its nodes."""
    ends = {"reason": Reason.STARTUP_DEADLINE_EXCEEDED, "domain": Domain.CLUSTER, "finished_at": NOW, "lacking_pods": 1}
    return [(retry_at((Attempt(number=1, job=f"{run}-1", **ends),)) or NOW) - NOW for run in runs]


def test_gang_that_got_some_nodes_backs_off_and_two_do_not_meet_again() -> None:
    pauses = partly_placed(*(f"gang-{number}" for number in range(20)))
    assert all(timedelta(minutes=1) <= pause <= timedelta(minutes=3) for pause in pauses)
    assert len(set(pauses)) == 20


def test_pods_that_a_gang_lacked_decide_the_pause_and_not_whether_a_container_started() -> None:
    refused = Attempt(number=1, job="bot-1", reason=Reason.POD_REJECTED, domain=Domain.CLUSTER, finished_at=NOW)
    preempted_before = refused.model_copy(update={"started_at": NOW - timedelta(hours=1)})
    assert retry_at((refused,)) is retry_at((preempted_before,)) is None
    pause = (retry_at((refused.model_copy(update={"lacking_pods": 1}),)) or NOW) - NOW
    assert pause >= timedelta(minutes=5), "no pod of this gang has run yet"


def test_attempts_replaced_while_they_wait_use_up_no_patience() -> None:
    released = attempts_of(*[Reason.UNSCHEDULABLE] * 90)
    assert exhausted(*released) is None
    after_nodes = attempts_of(*[Reason.POD_REJECTED] * 8, Reason.UNSCHEDULABLE)
    assert exhausted(*after_nodes) is None, "what excused the nodes may be forgotten by now"
    assert retry_at(released) is None


def test_attempts_on_bad_nodes_are_only_waited_for() -> None:
    attempts = attempts_of(*[Reason.POD_REJECTED] * 8, node="gpu-1")
    assert exhausted(*attempts) is not None
    assert find_exhausted(make_spec(), STATUS, attempts, NOW, {"gpu-1"}) is None
    found = find_exhausted(make_spec(), STATUS, attempts_of(*[Reason.POD_REJECTED] * 50, node="gpu-1"), NOW, {"gpu-1"})
    assert found is not None
    assert "exceed 6h" in found.message
