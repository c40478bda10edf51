"""What the watches tell may be late, lost, or told twice: no Job is made twice for it, and none is lost."""

import contextlib
from datetime import timedelta

import pytest

from qlora_api.names import Phase, Reason
from qlora_operator.cluster.cache import Told
from qlora_operator.cluster.interface import ClusterBusyError
from qlora_operator.cluster.parse import parse_job
from qlora_operator.controller.reconcile import reconcile
from qlora_operator.lifecycle import Watch
from tests.fakes import FakeCluster
from tests.make import INSTALLATION, PREPARED_WORD, PUBLISHED_WORD, REF, make_manifest
from tests.unit.operator.life import PREPARE, TRAIN, live_to_the_end, once, settle, without_times


@pytest.fixture
def cluster() -> FakeCluster:
    fake = FakeCluster()
    fake.submit(make_manifest())
    return fake


async def live_to_training(cluster: FakeCluster) -> None:
    await settle(cluster)
    cluster.end_pod(PREPARE, 0, PREPARED_WORD)
    await settle(cluster)
    cluster.start_pod(TRAIN)
    await settle(cluster)


async def test_the_first_child_costs_no_look(cluster: FakeCluster) -> None:
    await once(cluster)
    assert (cluster.looks, cluster.created) == (0, [PREPARE, PREPARE])


async def test_a_newcomer_is_not_read_again(cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    newcomer = await cluster.read_job(REF)
    monkeypatch.setattr(cluster, "read_job", None)
    await reconcile(REF, cluster, INSTALLATION, Watch(cluster.now, None, None), newcomer)
    assert cluster.created == [PREPARE, PREPARE]


async def test_a_newcomer_with_children_is_read_as_it_is_now(cluster: FakeCluster) -> None:
    newcomer = await cluster.read_job(REF)
    await live_to_the_end(cluster)
    outcome = await reconcile(REF, cluster, INSTALLATION, Watch(cluster.now, None, None), newcomer)
    assert outcome.status
    assert outcome.status.phase is Phase.SUCCEEDED


def test_what_the_watch_told_is_taken_once(cluster: FakeCluster) -> None:
    told, item = Told(), cluster.job
    assert item
    told.saw(REF, {**item, "status": {"phase": "Preparing"}})
    told.saw(REF, item)
    assert told.take(REF) == parse_job(item)
    assert told.take(REF) is None
    told.saw(REF, item)
    told.forget(REF)
    assert told.take(REF) is None


async def test_what_is_under_way_or_over_is_not_read_again(
    cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    await live_to_training(cluster)
    under_way = await cluster.read_job(REF)
    assert under_way
    with monkeypatch.context() as patch:
        patch.setattr(cluster, "read_job", None)
        outcome = await reconcile(REF, cluster, INSTALLATION, Watch(cluster.now, None, None), under_way)
        assert outcome.status
        assert outcome.status.phase is Phase.TRAINING
    await end_training(cluster)
    await settle(cluster)
    over, writes = await cluster.read_job(REF), len(cluster.writes)
    monkeypatch.setattr(cluster, "read_job", None)
    outcome = await reconcile(REF, cluster, INSTALLATION, Watch(cluster.now, None, None), over)
    assert outcome.status
    assert (outcome.status.phase, len(cluster.writes)) == (Phase.SUCCEEDED, writes)


@pytest.mark.parametrize("steps", range(4))
async def test_a_qlorajob_told_late_delays_and_does_nothing_else(steps: int, cluster: FakeCluster) -> None:
    quiet = FakeCluster()
    quiet.submit(make_manifest())
    for fake in (quiet, cluster):
        if fake is cluster:
            told = await fake.read_job(REF)
        await settle(fake)
        for number, step in enumerate(STEPS):
            if fake is cluster and number == steps:
                told = await fake.read_job(REF)
            await step(fake)
            await settle(fake)
    with contextlib.suppress(ClusterBusyError):
        await reconcile(REF, cluster, INSTALLATION, Watch(cluster.now, None, None), told)
    assert cluster.status == quiet.status
    assert cluster.created == quiet.created


async def test_what_changes_nothing_costs_no_look(cluster: FakeCluster) -> None:
    await live_to_training(cluster)
    looks, writes = cluster.looks, len(cluster.writes)
    cluster.pass_time(timedelta(minutes=10))
    await once(cluster)
    assert (cluster.looks, len(cluster.writes)) == (looks, writes)


async def test_a_blind_operator_is_as_right_as_any(cluster: FakeCluster) -> None:
    seeing = FakeCluster()
    seeing.submit(make_manifest())
    cluster.hold_events(lose_all=True)
    await live_to_the_end(seeing)
    await live_to_the_end(cluster)
    assert without_times(cluster.status) == without_times(seeing.status)
    assert cluster.created == seeing.created


async def end_prepare(cluster: FakeCluster) -> None:
    cluster.end_pod(PREPARE, 0, PREPARED_WORD)


async def start_training(cluster: FakeCluster) -> None:
    cluster.start_pod(TRAIN)


async def end_training(cluster: FakeCluster) -> None:
    cluster.pass_time(timedelta(minutes=10))
    cluster.end_pod(TRAIN, 0, PUBLISHED_WORD)


STEPS = (end_prepare, start_training, end_training)


@pytest.mark.parametrize("late", range(len(STEPS)))
async def test_an_event_that_comes_late_delays_and_does_nothing_else(late: int, cluster: FakeCluster) -> None:
    quiet = FakeCluster()
    quiet.submit(make_manifest())
    for fake in (quiet, cluster):
        await settle(fake)
        for number, step in enumerate(STEPS):
            if fake is cluster and number == late:
                fake.hold_events()
            await step(fake)
            await settle(fake)
            fake.deliver_events()
            await settle(fake)
    assert without_times(cluster.status) == without_times(quiet.status)
    assert cluster.created == quiet.created


async def test_our_own_job_that_is_not_told_yet_is_not_made_again(cluster: FakeCluster) -> None:
    cluster.hold_events()
    await settle(cluster)
    assert cluster.created == [PREPARE, PREPARE]
    cluster.deliver_events()
    cluster.end_pod(PREPARE, 0, PREPARED_WORD)
    cluster.hold_events()
    await settle(cluster)
    assert cluster.created == [PREPARE, PREPARE, TRAIN, TRAIN]


async def test_a_job_that_runs_is_not_lost_because_nobody_told_of_it(cluster: FakeCluster) -> None:
    await live_to_training(cluster)
    writes = len(cluster.writes)
    cluster.hold_events(lose_all=True)
    cluster.pass_time(timedelta(hours=1))
    await settle(cluster)
    assert len(cluster.writes) == writes


async def test_a_job_that_is_gone_is_lost_once_it_is_told(cluster: FakeCluster) -> None:
    await live_to_training(cluster)
    cluster.hold_events()
    cluster.remove(TRAIN)
    await settle(cluster)
    assert cluster.status["reason"] == Reason.TRAINING
    cluster.deliver_events()
    await once(cluster)
    assert cluster.status["attempts"][0]["reason"] == Reason.POD_LOST


async def test_a_pod_that_looks_overdue_may_run_by_now(cluster: FakeCluster) -> None:
    await settle(cluster)
    cluster.end_pod(PREPARE, 0, PREPARED_WORD)
    await settle(cluster)
    cluster.set_pod(TRAIN, "Pending", {"waiting": {"reason": "ContainerCreating"}})
    await settle(cluster)
    cluster.hold_events()
    cluster.start_pod(TRAIN)
    cluster.pass_time(timedelta(hours=2))
    await settle(cluster)
    assert cluster.status["reason"] == Reason.TRAINING


async def test_a_failed_run_gives_back_what_is_there_and_no_more(cluster: FakeCluster) -> None:
    await settle(cluster)
    cluster.end_pod(PREPARE, 0, PREPARED_WORD)
    await settle(cluster)
    cluster.set_pod(TRAIN, "Pending", {"waiting": {"reason": "ImagePullBackOff", "message": "denied"}})
    await settle(cluster)
    cluster.hold_events()
    cluster.pass_time(timedelta(minutes=30))
    await settle(cluster)
    assert (cluster.status["phase"], cluster.writes.count(("delete", TRAIN))) == ("Failed", 1)
