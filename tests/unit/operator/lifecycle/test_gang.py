"""Classification of gangs: which pod decides, which are waited for, and how long."""

from dataclasses import replace
from datetime import timedelta
from typing import Any, Final

import pytest

from qlora_api.reasons import Domain, Reason
from qlora_operator.lifecycle import classify
from qlora_operator.models import ChildJob, Exit, JobFailure, Pod, Stage
from tests.make import (
    NOW,
    PUBLISHED_MESSAGE,
    make_child,
    make_exit,
    make_pending_pod,
    make_pod,
    make_termination_message,
)

STARTUP: Final = timedelta(minutes=30)
FAILED: Final = JobFailure("BackoffLimitExceeded", "Job has reached the specified backoff limit")
OUT_OF_MEMORY: Final = make_termination_message(Reason.CUDA_OUT_OF_MEMORY, "rank 1: 24 GiB are too few")
PEER: Final = make_termination_message(Reason.COLLECTIVE_TIMEOUT, "rank 0: connection closed by peer")


def pod_of(index: int, end: Exit | None = None, **change: Any) -> Pod:
    phase = {} if end is None else {"phase": "Failed" if end.code else "Succeeded"}
    return make_pod(name=f"bot-1-{index}", index=index, exit=end, **phase | change)


def gang(*pods: Pod, **change: Any) -> ChildJob:
    return make_child(pods=pods, completions=2, **{"pod": None, **change})


def later(end: Exit, seconds: int) -> Exit:
    assert end.finished_at
    return replace(end, finished_at=end.finished_at + timedelta(seconds=seconds))


def test_gang_runs_when_all_pods_run() -> None:
    assert classify(gang(pod_of(0), pod_of(1)), STARTUP, NOW).stage is Stage.RUNNING


def test_other_pod_that_succeeds_first_ends_nothing() -> None:
    assert classify(gang(pod_of(0), pod_of(1, make_exit(0))), STARTUP, NOW).stage is Stage.RUNNING


def test_first_pod_publishes_for_gang() -> None:
    state = classify(gang(pod_of(0, make_exit(0, PUBLISHED_MESSAGE)), pod_of(1)), STARTUP, NOW)
    assert (state.stage, state.reason) == (Stage.ENDED, Reason.PUBLISHED)
    assert state.termination_message is not None


def test_cause_is_reported_at_once() -> None:
    state = classify(gang(pod_of(0), pod_of(1, make_exit(1, OUT_OF_MEMORY))), STARTUP, NOW)
    assert (state.stage, state.reason) == (Stage.ENDED, Reason.CUDA_OUT_OF_MEMORY)


def test_consequence_waits_for_cause() -> None:
    lost = pod_of(0, make_exit(1, PEER))
    waiting = classify(gang(lost, pod_of(1)), STARTUP, NOW)
    assert waiting.stage is Stage.RUNNING
    assert "bot-1-0 ended, and the other pods of the run are being stopped" in waiting.message
    known = classify(gang(lost, pod_of(1, later(make_exit(1, OUT_OF_MEMORY), 9))), STARTUP, NOW)
    assert (known.stage, known.reason) == (Stage.ENDED, Reason.CUDA_OUT_OF_MEMORY)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        pytest.param(make_exit(137), Reason.INTERRUPTED, id="killed"),
        pytest.param(make_exit(1, PEER), Reason.COLLECTIVE_TIMEOUT, id="both-lost-each-other"),
    ],
)
def test_without_cause_lowest_consequence_rank_is_reported(other: Exit, reason: Reason) -> None:
    state = classify(gang(pod_of(0, make_exit(1, PEER)), pod_of(1, other), failure=FAILED), STARTUP, NOW)
    assert (state.stage, state.reason) == (Stage.ENDED, reason)


def test_of_two_causes_earlier_is_reported() -> None:
    first, second = (
        make_exit(1, make_termination_message(Reason.S3_DENIED, "no")),
        later(make_exit(1, OUT_OF_MEMORY), 5),
    )
    assert classify(gang(pod_of(0, second), pod_of(1, first)), STARTUP, NOW).reason is Reason.S3_DENIED


def test_partly_scheduled_gang_fails_at_startup_deadline() -> None:
    child = gang(pod_of(0), make_pending_pod(name="bot-1-1", index=1, unschedulable="0/1 nodes are available"))
    deadline = NOW - timedelta(minutes=5) + STARTUP
    waiting = classify(child, STARTUP, NOW)
    assert (waiting.stage, waiting.reason, waiting.requeue_at) == (Stage.WAITING, Reason.UNSCHEDULABLE, deadline)
    ended = classify(child, STARTUP, deadline)
    assert (ended.stage, ended.reason) == (Stage.ENDED, Reason.STARTUP_DEADLINE_EXCEEDED)
    assert (
        ended.message == "only 1 of 2 pods got a node within 1800 s (spec.deadlines.startup): 0/1 nodes are available"
    )


def test_unscheduled_gang_waits_without_deadline() -> None:
    pods = [make_pending_pod(name=f"bot-1-{index}", index=index, unschedulable="no nodes") for index in (0, 1)]
    state = classify(gang(*pods), STARTUP, NOW + timedelta(days=1))
    assert (state.stage, state.reason, state.requeue_at) == (Stage.WAITING, Reason.UNSCHEDULABLE, None)


def test_pod_that_is_not_created_ends_placed_gang_at_startup_deadline() -> None:
    placed = pod_of(0, started_at=None, scheduled_at=NOW)
    child = gang(placed, created_at=NOW - timedelta(days=1), started_at=NOW, event_message="exceeded quota: gpus")
    waiting = classify(child, STARTUP, NOW + timedelta(minutes=1))
    assert (waiting.stage, waiting.reason) == (Stage.WAITING, Reason.POD_REJECTED)
    assert waiting.message == "Job support-bot-1 gets no pod: exceeded quota: gpus"
    ended = classify(replace(child, pods=(replace(placed, started_at=NOW),)), STARTUP, NOW + STARTUP)
    assert (ended.stage, ended.reason, ended.domain) == (Stage.ENDED, Reason.POD_REJECTED, Domain.CLUSTER)
    assert ended.message == "1 of 2 pods of Job support-bot-1 were not created: exceeded quota: gpus"
    assert classify(child, STARTUP, NOW + STARTUP).reason is Reason.STARTUP_DEADLINE_EXCEEDED


def test_cause_in_gang_that_lacks_refused_pod_is_reported() -> None:
    child = gang(pod_of(0, make_exit(1, OUT_OF_MEMORY)), failure=FAILED, event_message="exceeded quota: gpus")
    assert classify(child, STARTUP, NOW).reason is Reason.CUDA_OUT_OF_MEMORY


def test_pod_with_scheduling_gates_waits_for_them() -> None:
    pods = [make_pending_pod(name=f"bot-1-{index}", index=index, scheduling_gates=("kueue/tas",)) for index in (0, 1)]
    state = classify(gang(*pods), STARTUP, NOW)
    assert (state.stage, state.reason) == (Stage.WAITING, Reason.SCHEDULING)
    assert state.message == "pod bot-1-0 is waiting for a node; its scheduling gates are kueue/tas"


def test_gang_without_any_node_waits_for_missing_pods() -> None:
    child = gang(make_pending_pod(index=0), created_at=NOW - timedelta(days=1), started_at=NOW)
    assert classify(child, STARTUP, NOW + 10 * STARTUP).stage is Stage.WAITING


def test_pods_that_kubernetes_stops_are_not_missing() -> None:
    """A pod of a gang is deleted; the Job controller has removed it, and stops the others."""
    stopping = pod_of(1, deleting=True, deletion_timestamp=NOW + timedelta(minutes=1))
    state = classify(gang(stopping, failing=True, created_at=NOW - 2 * STARTUP), STARTUP, NOW)
    assert (state.stage, state.reason) == (Stage.RUNNING, Reason.TRAINING)


def test_gang_without_pods_is_lost() -> None:
    assert classify(gang(failure=FAILED), STARTUP, NOW).stage is Stage.LOST
