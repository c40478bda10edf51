"""Late, lost and repeated watch events: no Job is created twice, and none is lost."""

import contextlib
from datetime import timedelta

import pytest

from qlora_api.names import Phase
from qlora_api.reasons import Reason
from qlora_operator.cluster.cache import JobCache
from qlora_operator.cluster.interface import ClusterBusyError
from qlora_operator.cluster.parse import parse_job
from qlora_operator.controller.reconcile import reconcile
from qlora_operator.lifecycle import ReconcileContext
from tests.fakes import FakeCluster
from tests.make import INSTALLATION, PREPARED_MESSAGE, PUBLISHED_MESSAGE, REF, make_manifest
from tests.unit.operator.life import (
    PREPARE,
    TRAIN,
    reconcile_now,
    reconcile_until_stable,
    run_to_success,
    without_times,
)


@pytest.fixture
def cluster() -> FakeCluster:
    fake = FakeCluster()
    fake.submit(make_manifest())
    return fake


async def run_to_training(cluster: FakeCluster) -> None:
    await reconcile_until_stable(cluster)
    cluster.end_pod(PREPARE, 0, PREPARED_MESSAGE)
    await reconcile_until_stable(cluster)
    cluster.start_pod(TRAIN)
    await reconcile_until_stable(cluster)


async def test_first_step_needs_no_list(cluster: FakeCluster) -> None:
    await reconcile_now(cluster)
    assert (cluster.child_lists, cluster.created) == (0, [PREPARE, PREPARE])


async def test_new_job_is_not_read_live(cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    newcomer = await cluster.read_job(REF)
    monkeypatch.setattr(cluster, "read_job", None)
    await reconcile(REF, cluster, INSTALLATION, ReconcileContext(cluster.now, None, None), newcomer)
    assert cluster.created == [PREPARE, PREPARE]


async def test_new_job_with_children_is_read_live(cluster: FakeCluster) -> None:
    newcomer = await cluster.read_job(REF)
    await run_to_success(cluster)
    outcome = await reconcile(REF, cluster, INSTALLATION, ReconcileContext(cluster.now, None, None), newcomer)
    assert outcome.status
    assert outcome.status.phase is Phase.SUCCEEDED


def test_cached_job_is_popped_once(cluster: FakeCluster) -> None:
    cache, item = JobCache(), cluster.job
    assert item
    cache.on_update(REF, {**item, "status": {"phase": "Preparing"}})
    cache.on_update(REF, item)
    assert cache.pop(REF) == parse_job(item)
    assert cache.pop(REF) is None
    cache.on_update(REF, item)
    cache.forget(REF)
    assert cache.pop(REF) is None


async def test_running_and_finished_runs_are_not_read_live(
    cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    await run_to_training(cluster)
    under_way = await cluster.read_job(REF)
    assert under_way
    with monkeypatch.context() as patch:
        patch.setattr(cluster, "read_job", None)
        outcome = await reconcile(REF, cluster, INSTALLATION, ReconcileContext(cluster.now, None, None), under_way)
        assert outcome.status
        assert outcome.status.phase is Phase.TRAINING
    await end_training(cluster)
    await reconcile_until_stable(cluster)
    over, writes = await cluster.read_job(REF), len(cluster.writes)
    monkeypatch.setattr(cluster, "read_job", None)
    outcome = await reconcile(REF, cluster, INSTALLATION, ReconcileContext(cluster.now, None, None), over)
    assert outcome.status
    assert (outcome.status.phase, len(cluster.writes)) == (Phase.SUCCEEDED, writes)


@pytest.mark.parametrize("steps", range(4))
async def test_stale_job_only_delays(steps: int, cluster: FakeCluster) -> None:
    quiet = FakeCluster()
    quiet.submit(make_manifest())
    for fake in (quiet, cluster):
        if fake is cluster:
            cached = await fake.read_job(REF)
        await reconcile_until_stable(fake)
        for number, step in enumerate(STEPS):
            if fake is cluster and number == steps:
                cached = await fake.read_job(REF)
            await step(fake)
            await reconcile_until_stable(fake)
    with contextlib.suppress(ClusterBusyError):
        await reconcile(REF, cluster, INSTALLATION, ReconcileContext(cluster.now, None, None), cached)
    assert cluster.status == quiet.status
    assert cluster.created == quiet.created


async def test_noop_needs_no_list(cluster: FakeCluster) -> None:
    await run_to_training(cluster)
    lists, writes = cluster.child_lists, len(cluster.writes)
    cluster.pass_time(timedelta(minutes=10))
    await reconcile_now(cluster)
    assert (cluster.child_lists, len(cluster.writes)) == (lists, writes)


async def test_empty_cache_same_outcome(cluster: FakeCluster) -> None:
    seeing = FakeCluster()
    seeing.submit(make_manifest())
    cluster.pause_watches(lose_all=True)
    await run_to_success(seeing)
    await run_to_success(cluster)
    assert without_times(cluster.status) == without_times(seeing.status)
    assert cluster.created == seeing.created


async def end_prepare(cluster: FakeCluster) -> None:
    cluster.end_pod(PREPARE, 0, PREPARED_MESSAGE)


async def start_training(cluster: FakeCluster) -> None:
    cluster.start_pod(TRAIN)


async def end_training(cluster: FakeCluster) -> None:
    cluster.pass_time(timedelta(minutes=10))
    cluster.end_pod(TRAIN, 0, PUBLISHED_MESSAGE)


STEPS = (end_prepare, start_training, end_training)


@pytest.mark.parametrize("late", range(len(STEPS)))
async def test_stale_child_cache_only_delays(late: int, cluster: FakeCluster) -> None:
    quiet = FakeCluster()
    quiet.submit(make_manifest())
    for fake in (quiet, cluster):
        await reconcile_until_stable(fake)
        for number, step in enumerate(STEPS):
            if fake is cluster and number == late:
                fake.pause_watches()
            await step(fake)
            await reconcile_until_stable(fake)
            fake.resume_watches()
            await reconcile_until_stable(fake)
    assert without_times(cluster.status) == without_times(quiet.status)
    assert cluster.created == quiet.created


async def test_own_job_missing_in_cache_is_not_created_twice(cluster: FakeCluster) -> None:
    cluster.pause_watches()
    await reconcile_until_stable(cluster)
    assert cluster.created == [PREPARE, PREPARE]
    cluster.resume_watches()
    cluster.end_pod(PREPARE, 0, PREPARED_MESSAGE)
    cluster.pause_watches()
    await reconcile_until_stable(cluster)
    assert cluster.created == [PREPARE, PREPARE, TRAIN, TRAIN]


async def test_running_job_missing_in_cache_is_not_lost(cluster: FakeCluster) -> None:
    await run_to_training(cluster)
    writes = len(cluster.writes)
    cluster.pause_watches(lose_all=True)
    cluster.pass_time(timedelta(hours=1))
    await reconcile_until_stable(cluster)
    assert len(cluster.writes) == writes


async def test_deleted_job_is_lost_after_event(cluster: FakeCluster) -> None:
    await run_to_training(cluster)
    cluster.pause_watches()
    cluster.remove(TRAIN)
    await reconcile_until_stable(cluster)
    assert cluster.status["reason"] == Reason.TRAINING
    cluster.resume_watches()
    await reconcile_now(cluster)
    assert cluster.status["attempts"][0]["reason"] == Reason.POD_LOST


async def test_stale_startup_deadline_is_checked_live(cluster: FakeCluster) -> None:
    await reconcile_until_stable(cluster)
    cluster.end_pod(PREPARE, 0, PREPARED_MESSAGE)
    await reconcile_until_stable(cluster)
    cluster.set_pod(TRAIN, "Pending", {"waiting": {"reason": "ContainerCreating"}})
    await reconcile_until_stable(cluster)
    cluster.pause_watches()
    cluster.start_pod(TRAIN)
    cluster.pass_time(timedelta(hours=2))
    await reconcile_until_stable(cluster)
    assert cluster.status["reason"] == Reason.TRAINING


async def test_failed_run_deletes_only_live_jobs(cluster: FakeCluster) -> None:
    await run_to_training(cluster)
    assert cluster.job
    cluster.job["status"] |= {"phase": "Failed", "reason": "TrainerError", "finishedAt": "2026-03-01T12:00:00Z"}
    cluster.pause_watches()
    await reconcile_until_stable(cluster)
    assert [name for verb, name in cluster.writes if verb == "delete"] == [TRAIN]
