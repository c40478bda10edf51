"""What a stopped run knows when it goes on: its newest checkpoint, its plan, its budgets."""

from datetime import datetime, timedelta
from typing import Any

import pytest

from qlora_api import names
from qlora_api.names import Phase
from qlora_api.reasons import Reason
from qlora_api.v1alpha1 import Checkpoint, Progress
from qlora_operator.lifecycle.resumption import LONGEST_SILENCE
from tests.fakes import FakeCluster
from tests.make import REF, make_manifest, make_prepared, make_termination_message
from tests.unit.operator.life import TRAIN, newest_preparation, reconcile_now, reconcile_until_stable
from tests.unit.operator.lifecycle.test_interruptions import SECOND, run_config, start


def checkpoint(step: int, at: datetime) -> Checkpoint:
    uri = f"{make_prepared().prefix}/checkpoints/step-{step:06}-a1"
    return Checkpoint(step=step, uri=uri, time=at, verified=True, digest=f"{step:064}")


def report(cluster: FakeCluster, step: int) -> Progress:
    return Progress(
        percent=20, step=step, updated_at=cluster.now, phase=Phase.TRAINING, checkpoint=checkpoint(step, cluster.now)
    )


def submitted(**change: Any) -> FakeCluster:
    cluster = FakeCluster()
    cluster.submit(make_manifest(**change))
    return cluster


def interrupted(cluster: FakeCluster, step: int) -> str:
    """What a trainer writes on SIGTERM, after its last checkpoint."""
    return make_termination_message(Reason.INTERRUPTED, "asked to stop", checkpoint=checkpoint(step, cluster.now))


async def test_last_report_does_not_replace_the_newer_checkpoint_of_the_end() -> None:
    cluster = submitted()
    await start(cluster)
    last = report(cluster, 100)
    await reconcile_until_stable(cluster, last)
    cluster.pass_time(timedelta(minutes=1))
    cluster.end_pod(TRAIN, 143, interrupted(cluster, 900), keep_start=True)
    await reconcile_until_stable(cluster, last)
    await reconcile_until_stable(cluster, last)
    assert cluster.status["checkpoint"]["step"] == 900


async def test_suspended_run_resumes_from_the_checkpoint_that_it_wrote_as_it_was_stopped() -> None:
    cluster = submitted()
    await start(cluster)
    await reconcile_until_stable(cluster, report(cluster, 100))
    cluster.foreground_deletion = True
    cluster.change(suspend=True)
    await reconcile_until_stable(cluster)
    cluster.pass_time(timedelta(seconds=20))
    cluster.end_pod(TRAIN, 143, interrupted(cluster, 900), keep_start=True)
    await reconcile_until_stable(cluster)
    assert cluster.status["checkpoint"]["step"] == 900


async def test_attempt_that_was_preempted_restarts_from_its_newest_checkpoint() -> None:
    cluster = submitted(queue={"name": "gpus"})
    await start(cluster)
    await reconcile_until_stable(cluster, report(cluster, 100))
    cluster.end_pod(TRAIN, 143, interrupted(cluster, 110), keep_start=True)
    await reconcile_until_stable(cluster)
    cluster.pass_time(timedelta(minutes=1))
    await reconcile_until_stable(cluster)
    cluster.resume_job(SECOND)
    cluster.start_pod(SECOND)
    await reconcile_until_stable(cluster)
    cluster.pass_time(timedelta(hours=5))
    await reconcile_until_stable(cluster, report(cluster, 600))
    cluster.suspend_job(SECOND, "preempted to accommodate a higher priority Workload")
    await reconcile_until_stable(cluster)
    told = run_config(cluster, SECOND).checkpoint
    assert told is not None
    assert told.step == 600


@pytest.mark.parametrize(("silence", "step"), [(LONGEST_SILENCE / 2, 100), (2 * LONGEST_SILENCE, None)])
async def test_attempt_that_was_silent_at_its_end_may_have_written_newer_checkpoints(
    silence: timedelta, step: int | None
) -> None:
    cluster = submitted(deadlines={"heartbeat": "2h"})
    await start(cluster)
    await reconcile_until_stable(cluster, report(cluster, 100))
    cluster.pass_time(silence)
    cluster.end_pod(TRAIN, 143, make_termination_message(Reason.INTERRUPTED, "asked to stop"), keep_start=True)
    await reconcile_until_stable(cluster)
    cluster.pass_time(timedelta(minutes=1))
    await reconcile_until_stable(cluster)
    told = run_config(cluster, SECOND).checkpoint
    assert (told.step if told else None) == step


async def test_run_out_of_memory_continues_with_smaller_micro_batch() -> None:
    cluster = submitted(retries={"maxAttempts": 1})
    await start(cluster)
    size = cluster.status["plan"]["microBatchSize"]
    cluster.end_pod(TRAIN, 1, make_termination_message(Reason.CUDA_OUT_OF_MEMORY, "CUDA out of memory"))
    await reconcile_until_stable(cluster)
    assert cluster.status["phase"] == "Failed"
    assert cluster.status["plan"]["microBatchSize"] == size // 2


async def test_retry_after_the_children_have_expired_starts_at_once() -> None:
    cluster = submitted(ttl="1h")
    await reconcile_until_stable(cluster)
    refused = make_termination_message(Reason.DATASET_INVALID, "spec.dataset.uri: row 1")
    cluster.end_pod(newest_preparation(cluster), 1, refused)
    await reconcile_until_stable(cluster)
    cluster.pass_time(timedelta(hours=2))
    await reconcile_until_stable(cluster)
    assert (cluster.children, "childrenDeletedAt" in cluster.status) == ({}, True)
    cluster.annotate(names.RETRY_ANNOTATION, "2026-03-01T15:00:00Z")
    await reconcile_until_stable(cluster)
    assert ("Job", names.prepare_job_name(REF.name, 2)) in cluster.children
    assert "childrenDeletedAt" not in cluster.status


async def test_one_unexplained_end_after_other_failures_is_tried_again() -> None:
    cluster = submitted()
    endings = [(1, make_termination_message(Reason.S3_UNAVAILABLE, "503"))] * 3 + [(139, "")]
    for code, message in endings:
        await reconcile_until_stable(cluster)
        cluster.end_pod(newest_preparation(cluster), code, message)
        await reconcile_until_stable(cluster)
        cluster.pass_time(timedelta(minutes=6))
    assert cluster.status["phase"] == Phase.PREPARING
    assert cluster.status["preparation"]["unexplained"] == 1


async def test_preparation_is_repeated_where_the_crd_does_not_store_its_number() -> None:
    cluster = submitted()
    write = cluster.write_status

    async def prune(job: Any, status: Any) -> str:
        return await write(job, {key: value for key, value in status.items() if key != "preparation"})

    cluster.write_status = prune  # type: ignore[method-assign]
    await reconcile_now(cluster)
    cluster.end_pod(newest_preparation(cluster), 1, make_termination_message(Reason.S3_UNAVAILABLE, "503"))
    for _ in range(4):
        cluster.pass_time(timedelta(minutes=3))
        await reconcile_now(cluster)
    assert newest_preparation(cluster) == names.prepare_job_name(REF.name, 2)


async def test_run_that_the_gate_refused_has_no_checkpoint_to_resume_from() -> None:
    cluster = submitted()
    await start(cluster)
    await reconcile_until_stable(cluster, report(cluster, 100))
    cluster.end_pod(TRAIN, 1, make_termination_message(Reason.GATE_FAILED, "loss 2.0 > 1.0"), keep_start=True)
    await reconcile_until_stable(cluster)
    assert (cluster.status["phase"], cluster.status["reason"]) == ("Failed", "GateFailed")
    assert "checkpoint" not in cluster.status
