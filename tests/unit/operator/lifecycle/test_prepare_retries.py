"""Preparation is repeated for as long as its cause deserves, under a new number each time."""

from collections.abc import Callable
from datetime import timedelta
from typing import Final

import pytest

from qlora_api import names
from qlora_api.reasons import REASONS, Reason
from qlora_operator.lifecycle.prepare_retries import PATIENCE
from tests.fakes import FakeCluster
from tests.make import PREPARED_MESSAGE, REF, make_manifest, make_termination_message
from tests.unit.operator.life import PREPARE, PREPARE_AGAIN, TRAIN, reconcile_now, reconcile_until_stable

MISSING: Final = tuple(reason for reason, record in REASONS.items() if record.appears_late)
SERVICES: Final = (Reason.S3_UNAVAILABLE, Reason.HUB_UNAVAILABLE, Reason.HUB_RATE_LIMITED, Reason.UPLOAD_FAILED)
FINAL: Final = (
    Reason.INVALID_SPEC,
    Reason.DATASET_INVALID,
    Reason.MODEL_UNSUPPORTED,
    Reason.UNSAFE_MODEL_FORMAT,
    Reason.OUTPUT_EXISTS,
    Reason.TRAINER_ERROR,
)


@pytest.fixture
def cluster() -> FakeCluster:
    fake = FakeCluster()
    fake.submit(make_manifest())
    return fake


def prepare_name(number: int) -> str:
    return names.prepare_job_name(REF.name, number)


def newest(cluster: FakeCluster) -> str:
    return prepare_name(cluster.status["preparation"]["number"])


def outcome(cluster: FakeCluster) -> tuple[str, str]:
    return cluster.status["phase"], cluster.status["reason"]


def jobs(cluster: FakeCluster) -> list[str]:
    return [name for kind, name in cluster.children if kind == "Job"]


def end_with(cluster: FakeCluster, reason: Reason, message: str = "it is missing") -> None:
    cluster.end_pod(newest(cluster), 1, make_termination_message(reason, message))


async def fail_once(cluster: FakeCluster, reason: Reason) -> None:
    await reconcile_until_stable(cluster)
    end_with(cluster, reason)
    await reconcile_until_stable(cluster)


async def fail_until_given_up(cluster: FakeCluster, reason: Reason) -> timedelta:
    """Let each preparation end with a reason, and return how long it was tried."""
    begun = cluster.now
    for _ in range(500):
        await fail_once(cluster, reason)
        if cluster.status["phase"] == "Failed":
            return cluster.now - begun
        cluster.pass_time(timedelta(minutes=5))
    raise AssertionError("never given up")


@pytest.mark.parametrize("reason", MISSING)
async def test_what_is_missing_is_waited_for_and_found(cluster: FakeCluster, reason: Reason) -> None:
    cluster.pass_time(timedelta(days=3))
    await fail_once(cluster, reason)
    assert outcome(cluster) == ("Preparing", reason)
    until = cluster.now + timedelta(minutes=30)
    assert cluster.status["message"].startswith("it is missing; it is tried again until ")
    assert cluster.status["message"].endswith(f"{until:%H:%M} UTC (spec.deadlines.startup)")
    conditions = [cluster.condition(kind) for kind in ("Ready", "Reconciling", "Stalled", "Prepared")]
    assert conditions == ["False", "True", "False", "Unknown"]
    cluster.pass_time(timedelta(seconds=15))
    await reconcile_until_stable(cluster)
    assert jobs(cluster) == [PREPARE_AGAIN]
    assert outcome(cluster) == ("Preparing", reason)
    cluster.end_pod(PREPARE_AGAIN, 0, PREPARED_MESSAGE)
    await reconcile_until_stable(cluster)
    assert TRAIN in jobs(cluster)
    assert cluster.status["preparation"] == {
        "number": 2, "failures": 0, "unexplained": 0, "message": "", "avoidedNodes": [],
    }  # fmt: skip


@pytest.mark.parametrize("reason", MISSING)
async def test_what_stays_missing_fails_run_after_startup_deadline(cluster: FakeCluster, reason: Reason) -> None:
    cluster.change(deadlines={"startup": "20m"})
    tried = await fail_until_given_up(cluster, reason)
    assert timedelta(minutes=20) <= tried <= timedelta(minutes=27)
    assert outcome(cluster) == ("Failed", reason)
    assert cluster.status["message"].startswith("it is missing; 5 preparations failed, and it was tried again since ")
    assert "(spec.deadlines.startup)" in cluster.status["message"]


@pytest.mark.parametrize("reason", FINAL)
async def test_what_only_author_can_correct_fails_at_once(cluster: FakeCluster, reason: Reason) -> None:
    await fail_once(cluster, reason)
    assert outcome(cluster) == ("Failed", reason)


@pytest.mark.parametrize("reason", SERVICES)
async def test_services_are_tried_for_hours_and_given_up(cluster: FakeCluster, reason: Reason) -> None:
    tried = await fail_until_given_up(cluster, reason)
    assert PATIENCE <= tried <= PATIENCE + timedelta(minutes=7)
    assert outcome(cluster) == ("Failed", reason)


async def test_pauses_double_up_to_five_minutes(cluster: FakeCluster) -> None:
    pauses = []
    for _ in range(7):
        await fail_once(cluster, Reason.S3_UNAVAILABLE)
        wait = (await reconcile_now(cluster)).requeue_after
        assert wait is not None
        pauses.append(round(wait.total_seconds() / 15) * 15)
        cluster.pass_time(wait)
    assert pauses == [15, 30, 60, 120, 240, 300, 300]


def lose_node(cluster: FakeCluster, name: str) -> None:
    cluster.start_pod(name)
    cluster.delete_pod(name, timedelta(seconds=30), "DeletionByTaintManager")
    cluster.pass_time(timedelta(minutes=2))


def evict(cluster: FakeCluster, name: str) -> None:
    cluster.set_pod(name, "Failed", {}, reason="Evicted", message="disk pressure")
    cluster.finish_job(name, "Failed")


def preempt_before_start(cluster: FakeCluster, name: str) -> None:
    cluster.set_pod(name, "Failed", {}, message="preempted")
    disruption = {"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"}
    cluster.pods[name]["status"]["conditions"].append(disruption)
    cluster.finish_job(name, "Failed")


def reject(cluster: FakeCluster, name: str) -> None:
    cluster.set_pod(name, "Failed", {}, reason="UnexpectedAdmissionError", message="Allocate failed")
    cluster.finish_job(name, "Failed")


def fail_to_start(cluster: FakeCluster, name: str) -> None:
    ended = {"exitCode": 128, "reason": "StartError", "message": "runc: no space left on device"}
    cluster.set_pod(name, "Failed", {"terminated": ended})
    cluster.finish_job(name, "Failed")


def kill(cluster: FakeCluster, name: str) -> None:
    cluster.end_pod(name, 137, "")


def lose_image(cluster: FakeCluster, name: str) -> None:
    cluster.set_pod(name, "Pending", {"waiting": {"reason": "ImagePullBackOff", "message": "registry is away"}})
    cluster.pass_time(timedelta(minutes=31))


def lose_pod(cluster: FakeCluster, name: str) -> None:
    cluster.finish_job(name, "Failed")
    cluster.pods.pop(name, None)


def crash(cluster: FakeCluster, name: str) -> None:
    cluster.end_pod(name, 139, "")


NODE_FAILURES: Final = {
    Reason.NODE_LOST: lose_node,
    Reason.EVICTED: evict,
    Reason.PREEMPTED: preempt_before_start,
    Reason.POD_REJECTED: reject,
    Reason.INTERRUPTED: kill,
    Reason.IMAGE_PULL_FAILED: lose_image,
    Reason.POD_LOST: lose_pod,
    Reason.TRAINER_ERROR: crash,
}


@pytest.mark.parametrize(("reason", "fail"), [*NODE_FAILURES.items(), (Reason.POD_REJECTED, fail_to_start)])
@pytest.mark.parametrize("age", [timedelta(0), timedelta(hours=5), timedelta(days=30)])
async def test_node_failure_is_retried_whatever_age_of_run(
    cluster: FakeCluster, reason: Reason, fail: Callable[[FakeCluster, str], None], age: timedelta
) -> None:
    await reconcile_until_stable(cluster)
    cluster.pass_time(age)
    fail(cluster, PREPARE)
    await reconcile_until_stable(cluster)
    assert outcome(cluster) == ("Preparing", reason)
    requeue_at = cluster.now + ((await reconcile_now(cluster)).requeue_after or timedelta(0))
    cluster.pass_time(timedelta(seconds=5))
    again = cluster.now + ((await reconcile_now(cluster)).requeue_after or timedelta(0))
    assert abs(again - requeue_at) <= timedelta(seconds=1), "the pause does not start anew with each look"
    cluster.pass_time(timedelta(seconds=15))
    await reconcile_until_stable(cluster)
    assert PREPARE_AGAIN in cluster.created
    cluster.end_pod(PREPARE_AGAIN, 0, PREPARED_MESSAGE)
    await reconcile_until_stable(cluster)
    assert TRAIN in jobs(cluster)


async def test_node_where_preparation_failed_is_avoided_by_the_next(cluster: FakeCluster) -> None:
    await reconcile_until_stable(cluster)
    fail_to_start(cluster, PREPARE)
    await reconcile_until_stable(cluster)
    cluster.pass_time(timedelta(seconds=15))
    await reconcile_until_stable(cluster)
    pod = cluster.children["Job", PREPARE_AGAIN]["spec"]["template"]["spec"]
    [preferred] = pod["affinity"]["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    assert preferred["preference"]["matchFields"][0]["values"] == ["node-1"]


async def test_trainer_that_crashes_everywhere_fails_run_after_three_tries(cluster: FakeCluster) -> None:
    for number in (1, 2, 3):
        await reconcile_until_stable(cluster)
        crash(cluster, prepare_name(number))
        await reconcile_until_stable(cluster)
        cluster.pass_time(timedelta(minutes=1))
    assert outcome(cluster) == ("Failed", Reason.TRAINER_ERROR)


async def test_attempt_lost_after_five_hours_resets_preparation_budget(cluster: FakeCluster) -> None:
    await fail_once(cluster, Reason.SECRET_NOT_FOUND)
    cluster.pass_time(timedelta(seconds=15))
    await reconcile_until_stable(cluster)
    cluster.end_pod(PREPARE_AGAIN, 0, PREPARED_MESSAGE)
    await reconcile_until_stable(cluster)
    cluster.start_pod(TRAIN)
    await reconcile_until_stable(cluster)
    cluster.pass_time(timedelta(hours=5))
    cluster.remove(TRAIN)
    await fail_once(cluster, Reason.SECRET_NOT_FOUND)
    assert outcome(cluster) == ("Preparing", "SecretNotFound")
    assert (newest(cluster), cluster.status["preparation"]["failures"]) == (prepare_name(3), 1)


async def test_suspension_ends_the_wait_and_release_begins_it_anew(cluster: FakeCluster) -> None:
    await fail_once(cluster, Reason.SECRET_NOT_FOUND)
    cluster.change(suspend=True)
    await reconcile_until_stable(cluster)
    assert outcome(cluster) == ("Suspended", "SuspendedByUser")
    cluster.pass_time(timedelta(days=4))
    cluster.change(suspend=False)
    await reconcile_until_stable(cluster)
    assert outcome(cluster) == ("Preparing", "Preparing")
    await fail_once(cluster, Reason.SECRET_NOT_FOUND)
    assert outcome(cluster) == ("Preparing", "SecretNotFound")


async def test_run_released_after_days_is_retried_like_a_new_one(cluster: FakeCluster) -> None:
    cluster.change(suspend=True)
    await reconcile_until_stable(cluster)
    cluster.pass_time(timedelta(days=4))
    cluster.change(suspend=False)
    await fail_once(cluster, Reason.HUB_RATE_LIMITED)
    assert outcome(cluster) == ("Preparing", "HubRateLimited")


def wait_for_node(cluster: FakeCluster, name: str) -> None:
    cluster.set_pod(name, "Pending", {})
    cluster.pods[name]["spec"] = {}
    unschedulable = {"type": "PodScheduled", "status": "False", "message": "0/3 nodes are available"}
    cluster.pods[name]["status"] = {"phase": "Pending", "conditions": [unschedulable]}


async def test_wait_for_a_node_uses_up_no_patience(cluster: FakeCluster) -> None:
    await fail_once(cluster, Reason.HUB_RATE_LIMITED)
    cluster.pass_time(timedelta(seconds=15))
    await reconcile_until_stable(cluster)
    wait_for_node(cluster, PREPARE_AGAIN)
    cluster.pass_time(timedelta(hours=9))
    await fail_once(cluster, Reason.S3_UNAVAILABLE)
    assert outcome(cluster) == ("Preparing", "S3Unavailable")


@pytest.mark.parametrize("reason", [Reason.SECRET_NOT_FOUND, Reason.HUB_UNAVAILABLE])
async def test_absence_of_the_operator_uses_up_no_patience(cluster: FakeCluster, reason: Reason) -> None:
    await fail_once(cluster, reason)
    cluster.pass_time(timedelta(hours=9))  # nobody repeats the preparation
    await fail_once(cluster, reason)
    assert outcome(cluster) == ("Preparing", reason)
    cluster.pass_time(timedelta(minutes=2))
    await reconcile_until_stable(cluster)
    last = max(jobs(cluster))
    cluster.end_pod(last, 1, make_termination_message(reason, "it is missing"))
    cluster.pass_time(timedelta(hours=9))  # nobody sees that it has failed
    await reconcile_until_stable(cluster)
    assert outcome(cluster) == ("Preparing", reason)


async def test_wait_for_a_secret_uses_up_no_patience_with_services(cluster: FakeCluster) -> None:
    cluster.change(deadlines={"startup": "7d"})
    await fail_once(cluster, Reason.S3_UNAVAILABLE)
    for _ in range(3):
        cluster.pass_time(timedelta(minutes=5))
        await fail_once(cluster, Reason.SECRET_NOT_FOUND)
        cluster.pass_time(timedelta(days=1))
    await fail_once(cluster, Reason.S3_UNAVAILABLE)
    assert outcome(cluster) == ("Preparing", "S3Unavailable")


async def test_alternating_causes_are_given_up(cluster: FakeCluster) -> None:
    begun = cluster.now
    while cluster.now < begun + timedelta(hours=8):
        for reason in (Reason.S3_DENIED, Reason.S3_UNAVAILABLE):
            await fail_once(cluster, reason)
            if cluster.status["phase"] == "Failed":
                assert cluster.now - begun <= timedelta(minutes=45)
                return
            cluster.pass_time(timedelta(minutes=5))
    raise AssertionError("never given up")
