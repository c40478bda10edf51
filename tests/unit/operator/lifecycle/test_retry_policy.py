"""Another attempt: for what, with what, when, and how often."""

from datetime import timedelta
from typing import Any

import pytest

from qlora_api.names import Phase
from qlora_api.reasons import Reason, RetryAction
from qlora_api.v1alpha1 import Plan
from qlora_operator.lifecycle.retry_policy import choose_remedy, shrink
from qlora_operator.models import JobState, Stage
from tests.fakes import FakeCluster
from tests.make import (
    PREPARED_MESSAGE,
    PUBLISHED_MESSAGE,
    make_manifest,
    make_plan_status,
    make_termination_message,
)
from tests.unit.operator.controller.test_reconcile import PREPARE, SECOND, TRAIN, reconcile_until_stable

THIRD = "support-bot-3"
SHRINK, OTHER, PREFER = RetryAction.SHRINK_MICRO_BATCH, RetryAction.OTHER_NODE, RetryAction.PREFER_OTHER_NODE
RETRIED = {
    Reason.INTERRUPTED: RetryAction.RESUME,
    Reason.PREEMPTED: RetryAction.RESUME,
    Reason.EVICTED: RetryAction.RESUME,
    Reason.NODE_LOST: RetryAction.RESUME,
    Reason.POD_LOST: RetryAction.RESUME,
    Reason.UNSCHEDULABLE: RetryAction.RESUME,
    Reason.S3_UNAVAILABLE: RetryAction.RESUME,
    Reason.UPLOAD_FAILED: RetryAction.RESUME,
    Reason.HUB_UNAVAILABLE: RetryAction.RESUME,
    Reason.HUB_RATE_LIMITED: RetryAction.RESUME,
    Reason.ACCELERATOR_MISSING: OTHER,
    Reason.ACCELERATOR_FAILED: OTHER,
    Reason.HEARTBEAT_LOST: PREFER,
    Reason.COLLECTIVE_TIMEOUT: PREFER,
    Reason.POD_REJECTED: OTHER,
    Reason.IMAGE_PULL_FAILED: OTHER,
    Reason.STARTUP_DEADLINE_EXCEEDED: OTHER,
    Reason.TRAINER_ERROR: PREFER,
    Reason.CUDA_OUT_OF_MEMORY: SHRINK,
    Reason.HOST_OUT_OF_MEMORY: SHRINK,
}


def plan_of(**change: Any) -> Plan:
    return make_plan_status().model_copy(update=change)


@pytest.mark.parametrize("reason", Reason)
def test_only_what_another_attempt_can_fix_is_retried(reason: Reason) -> None:
    remedy = choose_remedy(JobState(Stage.ENDED, reason), plan_of())
    assert remedy == RETRIED.get(reason)


def test_host_oom_on_gpu_run_is_not_retried() -> None:
    state = JobState(Stage.ENDED, Reason.HOST_OUT_OF_MEMORY)
    assert choose_remedy(state, plan_of(device="cpu")) is RetryAction.SHRINK_MICRO_BATCH
    assert choose_remedy(state, plan_of(device="cuda")) is None


def test_micro_batch_of_one_cannot_shrink() -> None:
    state = JobState(Stage.ENDED, Reason.CUDA_OUT_OF_MEMORY)
    assert choose_remedy(state, plan_of(micro_batch_size=1)) is None
    assert choose_remedy(state, plan_of(micro_batch_size=1, gradient_checkpointing=True)) is None


def test_micro_batch_of_one_on_several_products_leaves_the_smallest_out() -> None:
    state = JobState(Stage.ENDED, Reason.CUDA_OUT_OF_MEMORY)
    smallest = {"micro_batch_size": 1, "gradient_checkpointing": True, "peak_bytes": 15 << 30}
    plan = plan_of(**smallest, gpu_product="A", gpu_products=("A", "B"))
    assert choose_remedy(state, plan) is RetryAction.SHRINK_MICRO_BATCH
    larger = shrink(plan, 4)
    assert (larger.gpu_product, larger.gpu_products) == ("B", ("B",))
    assert (larger.micro_batch_size, larger.gradient_accumulation) == (1, plan.gradient_accumulation)
    assert larger.reasons[-1] == "A left out: attempt 4 ran out of memory with 1 row, where 15.0 GiB were predicted"
    assert choose_remedy(state, larger) is None
    assert shrink(plan.model_copy(update={"gradient_checkpointing": False}), 4).gpu_products == ("A", "B")


def test_micro_batch_of_one_turns_on_checkpointing() -> None:
    state = JobState(Stage.ENDED, Reason.CUDA_OUT_OF_MEMORY)
    plan = plan_of(micro_batch_size=1, gradient_checkpointing=False)
    assert choose_remedy(state, plan) is RetryAction.SHRINK_MICRO_BATCH
    smaller = shrink(plan, 3)
    assert smaller.gradient_checkpointing is True
    assert (smaller.micro_batch_size, smaller.gradient_accumulation) == (1, plan.gradient_accumulation)
    assert smaller.reasons[-1] == "gradient checkpointing on: attempt 3 ran out of memory with 1 row"


@pytest.mark.parametrize(
    ("rows", "passes", "expected"), [(8, 2, (4, 4)), (3, 4, (1, 12)), (6, 1, (3, 2)), (5, 1, (2, 3))]
)
def test_shrunk_plan_covers_global_batch(rows: int, passes: int, expected: tuple[int, int]) -> None:
    smaller = shrink(plan_of(micro_batch_size=rows, gradient_accumulation=passes), 1)
    assert (smaller.micro_batch_size, smaller.gradient_accumulation) == expected
    assert smaller.micro_batch_size * smaller.gradient_accumulation >= rows * passes
    assert smaller.reasons[-1].endswith(f"attempt 1 ran out of memory with {rows} rows")


def test_wrong_peak_estimate_moves_to_reasons() -> None:
    smaller = shrink(plan_of(micro_batch_size=8, peak_bytes=20 << 30), 1)
    assert smaller.peak_bytes is None
    assert smaller.reasons[-1].endswith("ran out of memory with 8 rows, where 20.0 GiB were predicted")


@pytest.fixture
def cluster() -> FakeCluster:
    fake = FakeCluster()
    fake.submit(make_manifest(retries={"maxAttempts": 2}, training={"globalBatchSize": 16}))
    return fake


async def start(cluster: FakeCluster) -> None:
    await reconcile_until_stable(cluster)
    cluster.end_pod(PREPARE, 0, PREPARED_MESSAGE)
    await reconcile_until_stable(cluster)
    cluster.start_pod(TRAIN)
    await reconcile_until_stable(cluster)


async def test_oom_retries_with_smaller_micro_batch(cluster: FakeCluster) -> None:
    await start(cluster)
    cluster.end_pod(TRAIN, 1, make_termination_message(Reason.CUDA_OUT_OF_MEMORY, "24 GiB are too few"))
    await reconcile_until_stable(cluster)
    status = cluster.status
    assert (status["phase"], status["attempt"]) == (Phase.SCHEDULING, 2)
    assert (status["plan"]["microBatchSize"], status["plan"]["gradientAccumulation"]) == (8, 2)
    assert [attempt["microBatchSize"] for attempt in status["attempts"]] == [16, 8]
    assert status["attempts"][0]["reason"] == Reason.CUDA_OUT_OF_MEMORY
    assert '"microBatchSize": 8' in cluster.children["ConfigMap", SECOND]["data"]["run.json"]
    assert cluster.created.count(PREPARE) == 2, "the Job and its ConfigMap, once"
    cluster.start_pod(SECOND)
    cluster.end_pod(SECOND, 0, PUBLISHED_MESSAGE)
    await reconcile_until_stable(cluster)
    assert cluster.status["phase"] == Phase.SUCCEEDED


async def test_last_attempt_fails_run(cluster: FakeCluster) -> None:
    await start(cluster)
    for job in (TRAIN, SECOND):
        cluster.start_pod(job)
        cluster.end_pod(job, 1, make_termination_message(Reason.CUDA_OUT_OF_MEMORY, "24 GiB are too few"))
        await reconcile_until_stable(cluster)
    assert (cluster.status["phase"], cluster.status["reason"]) == (Phase.FAILED, Reason.RETRIES_EXHAUSTED)
    assert cluster.status["message"].startswith(
        "2 of 2 attempts (spec.retries.maxAttempts) failed; the last one ended with CudaOutOfMemory: 24 GiB are too few"
    )
    assert ("Job", THIRD) not in cluster.children


async def test_disruptions_are_retried_beyond_max_attempts(cluster: FakeCluster) -> None:
    await start(cluster)
    for job in (TRAIN, SECOND):
        cluster.start_pod(job)
        cluster.end_pod(job, 143, make_termination_message(Reason.INTERRUPTED, "asked to stop"))
        await reconcile_until_stable(cluster)
    cluster.pass_time(timedelta(seconds=10))
    await reconcile_until_stable(cluster)
    assert (cluster.status["phase"], cluster.status["attempt"]) == (Phase.SCHEDULING, 3)
    assert ("Job", THIRD) in cluster.children


async def test_terminal_reason_is_not_retried(cluster: FakeCluster) -> None:
    await start(cluster)
    cluster.end_pod(TRAIN, 1, make_termination_message(Reason.NON_FINITE_LOSS, "loss nan"))
    await reconcile_until_stable(cluster)
    assert (cluster.status["phase"], cluster.status["reason"]) == (Phase.FAILED, Reason.NON_FINITE_LOSS)


@pytest.mark.parametrize("node_ahead", [0, 30])
async def test_unavailable_service_is_retried_with_backoff(cluster: FakeCluster, node_ahead: int) -> None:
    cluster.node_clock_skew = timedelta(minutes=node_ahead)
    await start(cluster)
    cluster.end_pod(TRAIN, 1, make_termination_message(Reason.S3_UNAVAILABLE, "503"))
    await reconcile_until_stable(cluster)
    assert ("Job", SECOND) not in cluster.children
    assert cluster.status["message"] == "attempt 1 ended: 503; the next one resumes from the last checkpoint"
    cluster.pass_time(timedelta(seconds=10))
    await reconcile_until_stable(cluster)
    assert ("Job", SECOND) in cluster.children


async def test_next_attempt_waits_for_previous_pods(cluster: FakeCluster) -> None:
    await start(cluster)
    cluster.end_pod(TRAIN, 1, make_termination_message(Reason.CUDA_OUT_OF_MEMORY, "too few"))
    cluster.children["Job", TRAIN]["status"] = {}
    await reconcile_until_stable(cluster)
    assert ("Job", SECOND) not in cluster.children
    cluster.finish_job(TRAIN, "Failed")
    await reconcile_until_stable(cluster)
    assert ("Job", SECOND) in cluster.children
