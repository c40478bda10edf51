"""Prepare Jobs are numbered: a dead node holds no name, a crash loses no number, a queue keeps none for ever."""

from datetime import timedelta
from typing import Any

import pytest

from qlora_api import names
from qlora_api.names import Role
from qlora_api.reasons import Reason
from qlora_operator.cluster.parse import parse_child
from qlora_operator.controller.children import NAME_CONFLICT_RETRY
from qlora_operator.models import ChildJob
from tests.fakes import FakeCluster
from tests.make import PREPARED_MESSAGE, REF, make_manifest, make_termination_message
from tests.unit.operator.life import PREPARE, PREPARE_AGAIN, TRAIN, reconcile_now, reconcile_until_stable, without_times
from tests.unit.operator.lifecycle.test_prepare_retries import fail_once, jobs, newest, outcome, prepare_name


def child_of(cluster: FakeCluster, name: str) -> ChildJob:
    return parse_child(cluster.children["Job", name])


@pytest.fixture
def cluster() -> FakeCluster:
    fake = FakeCluster()
    fake.submit(make_manifest())
    return fake


async def test_prepare_job_on_dead_node_holds_nothing_up(cluster: FakeCluster) -> None:
    """A Job that is being deleted and cannot go keeps its name; the next one has another."""
    await reconcile_until_stable(cluster)
    cluster.start_pod(PREPARE)
    cluster.foreground_deletion = True
    await cluster.delete_job(REF, child_of(cluster, PREPARE))
    await reconcile_until_stable(cluster)
    assert PREPARE_AGAIN in jobs(cluster)
    cluster.end_pod(PREPARE_AGAIN, 0, PREPARED_MESSAGE)
    await reconcile_until_stable(cluster)
    assert jobs(cluster) == [PREPARE, PREPARE_AGAIN, TRAIN]


async def test_prepare_job_of_deleted_run_on_dead_node_holds_no_name(cluster: FakeCluster) -> None:
    """A QLoRAJob of the same name is created while the prepare Job of the former cannot go."""
    await reconcile_until_stable(cluster)
    cluster.foreground_deletion = True
    await cluster.delete_job(REF, child_of(cluster, PREPARE))
    del cluster.children["ConfigMap", PREPARE]
    cluster.submit(make_manifest())
    for _ in range(3):
        assert (await reconcile_now(cluster)).requeue_after == NAME_CONFLICT_RETRY
        assert outcome(cluster) == ("Pending", "Accepted")
    cluster.pass_time(timedelta(minutes=5))
    await reconcile_now(cluster)
    await reconcile_until_stable(cluster)
    assert outcome(cluster) == ("Preparing", "Preparing")
    assert PREPARE_AGAIN in jobs(cluster)


async def test_training_job_on_dead_node_that_somebody_deletes_holds_nothing_up(cluster: FakeCluster) -> None:
    await reconcile_until_stable(cluster)
    cluster.end_pod(PREPARE, 0, PREPARED_MESSAGE)
    await reconcile_until_stable(cluster)
    cluster.start_pod(TRAIN)
    await reconcile_until_stable(cluster)
    cluster.foreground_deletion = True
    await cluster.delete_job(REF, child_of(cluster, TRAIN))
    cluster.delete_pod(TRAIN, timedelta(seconds=60), "")
    await reconcile_until_stable(cluster)
    assert cluster.status["message"].startswith("the training Job is being deleted"), "its pod may still publish"
    cluster.pass_time(timedelta(minutes=2))
    await reconcile_until_stable(cluster)
    assert PREPARE_AGAIN in jobs(cluster)
    assert cluster.status["attempts"][0]["reason"] == "PodLost"
    cluster.end_pod(PREPARE_AGAIN, 0, PREPARED_MESSAGE)
    await reconcile_until_stable(cluster)
    assert names.train_job_name(REF.name, 2) in jobs(cluster)


async def wait_for_secret(cluster: FakeCluster) -> None:
    """The Secret appears after the second preparation, and a training Job is lost once."""
    for number in (1, 2):
        await reconcile_until_stable(cluster)
        cluster.end_pod(prepare_name(number), 1, make_termination_message(Reason.SECRET_NOT_FOUND, "no Secret"))
        await reconcile_until_stable(cluster)
        cluster.pass_time(timedelta(seconds=40))
    await reconcile_until_stable(cluster)
    cluster.end_pod(prepare_name(3), 0, PREPARED_MESSAGE)
    await reconcile_until_stable(cluster)
    cluster.start_pod(TRAIN)
    await reconcile_until_stable(cluster)
    cluster.remove(TRAIN)
    await reconcile_until_stable(cluster)
    cluster.end_pod(prepare_name(4), 0, PREPARED_MESSAGE)
    await reconcile_until_stable(cluster)


def without_preparation_times(status: dict[str, Any]) -> str:
    return without_times(status | {"message": ""})


@pytest.mark.parametrize("write", range(1, 45))
async def test_crash_at_any_write_of_repeated_preparation_same_outcome(write: int) -> None:
    quiet, crashing = FakeCluster(), FakeCluster()
    for fake in (quiet, crashing):
        fake.submit(make_manifest())
    crashing.crash_after = lambda number: number == write
    await wait_for_secret(quiet)
    await wait_for_secret(crashing)
    assert len(quiet.writes) < 45
    assert without_preparation_times(crashing.status) == without_preparation_times(quiet.status)
    assert crashing.created == quiet.created
    assert jobs(crashing) == jobs(quiet) == [prepare_name(4), names.train_job_name(REF.name, 2)]


async def test_wiped_status_follows_newest_prepare_job(cluster: FakeCluster) -> None:
    await fail_once(cluster, Reason.SECRET_NOT_FOUND)
    cluster.pass_time(timedelta(seconds=15))
    await reconcile_until_stable(cluster)
    assert cluster.job
    cluster.job["status"] = {"observedGeneration": -1}
    await reconcile_until_stable(cluster)
    assert (newest(cluster), jobs(cluster)) == (PREPARE_AGAIN, [PREPARE_AGAIN])


async def test_repeated_preparation_leaves_one_config_map_and_two_events(cluster: FakeCluster) -> None:
    for _ in range(5):
        await fail_once(cluster, Reason.SECRET_NOT_FOUND)
        cluster.pass_time(timedelta(minutes=5))
    assert [name for kind, name in cluster.children if kind == "ConfigMap"] == [PREPARE]
    assert sorted(event["reason"] for event in cluster.events.values()) == ["Preparing", "SecretNotFound"]


async def test_prepare_job_of_earlier_operator_version_is_followed(cluster: FakeCluster) -> None:
    """Its label has no number, and the status no preparation."""
    await reconcile_until_stable(cluster)
    del cluster.children["Job", PREPARE]["metadata"]["labels"][names.PREPARATION_LABEL]
    assert cluster.job
    del cluster.job["status"]["preparation"]
    cluster.end_pod(PREPARE, 0, PREPARED_MESSAGE)
    await reconcile_until_stable(cluster)
    assert TRAIN in jobs(cluster)


# Queues that manage all Jobs


async def hold_by_queue(cluster: FakeCluster) -> None:
    await reconcile_until_stable(cluster)
    cluster.children["Job", PREPARE]["spec"]["suspend"] = True
    await reconcile_until_stable(cluster)


async def test_suspended_prepare_job_gets_queue_of_run(cluster: FakeCluster) -> None:
    cluster.change(queue={"name": "team-a", "priorityClass": "low"})
    await hold_by_queue(cluster)
    labels = cluster.children["Job", PREPARE]["metadata"]["labels"]
    assert (labels[names.QUEUE_LABEL], labels[names.PRIORITY_CLASS_LABEL]) == ("team-a", "low")
    assert labels[names.ROLE_LABEL] == Role.PREPARE
    assert outcome(cluster) == ("Preparing", "Queued")
    cluster.change(queue={"name": "team-b"})
    await reconcile_until_stable(cluster)
    assert cluster.children["Job", PREPARE]["metadata"]["labels"][names.QUEUE_LABEL] == "team-b"


async def test_prepare_job_that_no_queue_holds_is_in_none(cluster: FakeCluster) -> None:
    cluster.change(queue={"name": "team-a"})
    await reconcile_until_stable(cluster)
    assert names.QUEUE_LABEL not in cluster.children["Job", PREPARE]["metadata"]["labels"]


async def test_suspended_prepare_job_without_queue_says_which_field_is_missing(cluster: FakeCluster) -> None:
    await hold_by_queue(cluster)
    assert outcome(cluster) == ("Preparing", "Queued")
    assert cluster.status["message"].startswith(f"spec.queue: Job {PREPARE} is suspended, ")


# Names


@pytest.mark.parametrize("number", [1, 2, names.MOST_PREPARATIONS])
def test_host_name_of_prepare_pod_fits_for_longest_name(number: int) -> None:
    """Kubernetes refuses an Indexed Job whose name and highest index exceed 63 characters (a DNS label)."""
    assert len(f"{names.prepare_job_name('n' * names.MAX_JOB_NAME, number)}-0") <= 63


def test_names_of_repeated_prepare_jobs_are_no_names_of_other_runs() -> None:
    """A QLoRAJob may be called support-bot-prepare, and has training Jobs support-bot-prepare-2."""
    repeated = {prepare_name(number) for number in range(2, 200)}
    others = [REF.name, f"{REF.name}-prepare", f"{REF.name}-prep", f"{REF.name}-1"]
    taken = {names.train_job_name(other, number) for other in others for number in range(1, 200)}
    assert not repeated & (taken | {names.prepare_job_name(other) for other in others})
