"""A failed run continues in place once the limit that ended it is raised."""

from datetime import timedelta
from typing import Any

import pytest

from qlora_api import names
from qlora_api.names import Phase
from qlora_api.reasons import Reason
from tests.fakes import FakeCluster
from tests.make import PREPARED_MESSAGE, PUBLISHED_MESSAGE, REF, make_manifest, make_termination_message
from tests.unit.operator.life import PREPARE, TRAIN, reconcile_until_stable


@pytest.fixture
def cluster() -> FakeCluster:
    fake = FakeCluster()
    fake.submit(make_manifest(retries={"maxAttempts": 1}, deadlines={"total": "1h"}))
    return fake


def train(number: int) -> str:
    return names.train_job_name(REF.name, number)


def outcome(cluster: FakeCluster) -> tuple[str, str]:
    return cluster.status["phase"], cluster.status["reason"]


async def start(cluster: FakeCluster) -> None:
    await reconcile_until_stable(cluster)
    cluster.end_pod(PREPARE, 0, PREPARED_MESSAGE)
    await reconcile_until_stable(cluster)
    cluster.start_pod(TRAIN)
    await reconcile_until_stable(cluster)


async def run_out_of_memory(cluster: FakeCluster) -> None:
    await start(cluster)
    cluster.end_pod(TRAIN, 1, make_termination_message(Reason.CUDA_OUT_OF_MEMORY, "too few"))
    await reconcile_until_stable(cluster)
    assert outcome(cluster) == ("Failed", "RetriesExhausted")


async def exceed_total(cluster: FakeCluster) -> None:
    await start(cluster)
    cluster.pass_time(timedelta(hours=2))
    cluster.end_pod(TRAIN, 143, make_termination_message(Reason.INTERRUPTED, "stop"), keep_start=True)
    cluster.finish_job(TRAIN, "Failed", "DeadlineExceeded")
    await reconcile_until_stable(cluster)
    assert outcome(cluster) == ("Failed", "DeadlineExceeded")


async def exhaust_nodes(cluster: FakeCluster) -> None:
    await start(cluster)
    for number in range(1, 7):
        cluster.start_pod(train(number))
        cluster.end_pod(train(number), 139, "")
        await reconcile_until_stable(cluster)
        cluster.pass_time(timedelta(minutes=11))
        await reconcile_until_stable(cluster)
    assert outcome(cluster) == ("Failed", "RetriesExhausted")


async def succeed(cluster: FakeCluster, number: int) -> None:
    await reconcile_until_stable(cluster)
    assert cluster.status["phase"] == Phase.SCHEDULING
    assert "finishedAt" not in cluster.status
    assert cluster.condition("Stalled") == "False"
    cluster.start_pod(train(number))
    cluster.end_pod(train(number), 0, PUBLISHED_MESSAGE)
    await reconcile_until_stable(cluster)
    assert outcome(cluster) == ("Succeeded", "Published")
    assert cluster.created.count(PREPARE) == 2, "the Job and its ConfigMap, once"


async def test_raised_max_attempts_continues_run(cluster: FakeCluster) -> None:
    await run_out_of_memory(cluster)
    assert cluster.status["retryLimits"] == {"maxAttempts": 1, "total": "1h", "startup": "30m"}
    cluster.change(retries={"maxAttempts": 2})
    await succeed(cluster, 2)
    assert "retryLimits" not in cluster.status


async def test_raised_total_deadline_continues_run(cluster: FakeCluster) -> None:
    await exceed_total(cluster)
    cluster.change(deadlines={"total": "3h"})
    await succeed(cluster, 2)


async def test_raised_max_attempts_forgives_what_nodes_took(cluster: FakeCluster) -> None:
    await exhaust_nodes(cluster)
    cluster.change(retries={"maxAttempts": 2}, deadlines={"total": "9h"})
    await reconcile_until_stable(cluster)
    assert cluster.status["forgivenAttempts"] == 6
    cluster.start_pod(train(7))
    cluster.end_pod(train(7), 139, "")
    await reconcile_until_stable(cluster)
    assert cluster.status["phase"] == Phase.SCHEDULING
    cluster.pass_time(timedelta(minutes=11))
    await succeed(cluster, 8)


async def test_later_startup_deadline_continues_a_run_whose_pods_did_not_start_in_time(cluster: FakeCluster) -> None:
    await reconcile_until_stable(cluster)
    cluster.end_pod(PREPARE, 0, PREPARED_MESSAGE)
    await reconcile_until_stable(cluster)
    for number in range(1, 7):
        cluster.set_pod(train(number), "Pending", {"waiting": {"reason": "ContainerCreating"}})
        cluster.pass_time(timedelta(minutes=31))
        await reconcile_until_stable(cluster)
        cluster.pass_time(timedelta(minutes=11))
        await reconcile_until_stable(cluster)
    assert outcome(cluster) == ("Failed", "RetriesExhausted")
    cluster.change(deadlines={"total": "1h", "startup": "2h"})
    await reconcile_until_stable(cluster)
    assert cluster.status["forgivenAttempts"] == 6
    await succeed(cluster, 7)


@pytest.mark.parametrize(
    ("fail", "change"),
    [
        pytest.param(exhaust_nodes, {"deadlines": {"total": "1h", "startup": "9h"}}, id="pods-that-did-start"),
        pytest.param(run_out_of_memory, {"ttl": "24h"}, id="another-field"),
        pytest.param(run_out_of_memory, {"deadlines": {"total": "9h"}}, id="another-limit"),
        pytest.param(run_out_of_memory, {"retries": {"maxAttempts": 1}}, id="the-same"),
        pytest.param(exceed_total, {"deadlines": {"total": "30m"}}, id="lowered"),
        pytest.param(exceed_total, {"deadlines": {"total": "90m"}}, id="not-enough"),
        pytest.param(exceed_total, {"retries": {"maxAttempts": 9}}, id="other-budget"),
    ],
)
async def test_other_change_of_spec_continues_nothing(cluster: FakeCluster, fail: Any, change: dict[str, Any]) -> None:
    await fail(cluster)
    before = outcome(cluster)
    cluster.change(**change)
    await reconcile_until_stable(cluster)
    assert outcome(cluster) == before
    assert ("Job", train(1 + len(cluster.status["attempts"]))) not in cluster.children


async def test_author_must_act_whatever_is_raised(cluster: FakeCluster) -> None:
    await start(cluster)
    cluster.end_pod(TRAIN, 1, make_termination_message(Reason.NON_FINITE_LOSS, "nan"))
    await reconcile_until_stable(cluster)
    cluster.change(retries={"maxAttempts": 9}, deadlines={"total": "9h", "startup": "9h"})
    await reconcile_until_stable(cluster)
    assert outcome(cluster) == ("Failed", "NonFiniteLoss")


async def test_run_that_failed_before_limits_were_recorded_stays_failed(cluster: FakeCluster) -> None:
    await run_out_of_memory(cluster)
    assert cluster.job
    del cluster.job["status"]["retryLimits"]
    cluster.job["spec"]["retries"] = {"maxAttempts": 2}
    cluster.change(ttl="7d")
    await reconcile_until_stable(cluster)
    assert cluster.status["phase"] == Phase.FAILED


async def test_raised_startup_deadline_prepares_again(cluster: FakeCluster) -> None:
    await reconcile_until_stable(cluster)
    number = 1
    while cluster.status["phase"] == Phase.PREPARING:
        if ("Job", name := names.prepare_job_name(REF.name, number)) in cluster.children:
            cluster.end_pod(name, 1, make_termination_message(Reason.SECRET_NOT_FOUND, "no Secret s3"))
            number += 1
        cluster.pass_time(timedelta(minutes=1))
        await reconcile_until_stable(cluster)
    assert outcome(cluster) == ("Failed", "SecretNotFound")
    cluster.change(deadlines={"startup": "2h"})
    await reconcile_until_stable(cluster)
    assert cluster.status["phase"] == Phase.PREPARING
    [prepare] = [name for kind, name in cluster.children if kind == "Job"]
    cluster.end_pod(prepare, 0, PREPARED_MESSAGE)
    await reconcile_until_stable(cluster)
    assert ("Job", TRAIN) in cluster.children


async def test_revival_survives_crash_after_each_write(cluster: FakeCluster) -> None:
    await run_out_of_memory(cluster)
    cluster.change(retries={"maxAttempts": 2})
    cluster.crash_after = lambda count: count % 2 == 0
    await reconcile_until_stable(cluster)
    cluster.crash_after = lambda _: False
    await succeed(cluster, 2)


async def test_raised_total_deadline_does_not_continue_a_preparation_that_took_too_long(cluster: FakeCluster) -> None:
    """The hour of a preparation is fixed; the run would fail again with the same Job."""
    await start(cluster)
    cluster.remove(TRAIN)
    await reconcile_until_stable(cluster)
    assert cluster.status["phase"] == Phase.PREPARING
    again = names.prepare_job_name(REF.name, 2)
    cluster.start_pod(again)
    cluster.pass_time(timedelta(hours=1))
    cluster.end_pod(again, 143, "", keep_start=True)
    cluster.finish_job(again, "Failed", "DeadlineExceeded")
    await reconcile_until_stable(cluster)
    assert outcome(cluster) == ("Failed", "DeadlineExceeded")
    writes = len(cluster.writes)
    cluster.change(deadlines={"total": "1000h"})
    await reconcile_until_stable(cluster)
    assert outcome(cluster) == ("Failed", "DeadlineExceeded")
    assert [write for write in cluster.writes[writes:] if write[0] != "status"] == []
