"""The annotation qlora.dev/retry-requested-at on an in-memory cluster: a failed run tries again in place, once."""

from datetime import timedelta
from typing import Any, Final

import pytest

from qlora_api import names
from qlora_api.names import Phase
from qlora_api.reasons import Reason
from qlora_api.v1alpha1.status import MAX_ATTEMPTS_LISTED
from qlora_operator.cluster.parse import parse_job
from qlora_operator.controller.reconcile import reconcile_once
from qlora_operator.lifecycle import ReconcileContext
from qlora_operator.lifecycle.budgets import LONGEST_PAUSE
from qlora_operator.lifecycle.job_deadline import SAFETY_MARGIN
from qlora_operator.models import RawJob
from tests.fakes import FakeCluster
from tests.make import INSTALLATION, PREPARED_MESSAGE, PUBLISHED_MESSAGE, REF, make_manifest, make_termination_message
from tests.unit.operator.life import (
    PREPARE,
    PREPARE_AGAIN,
    TRAIN,
    newest_preparation,
    reconcile_now,
    reconcile_until_stable,
    run_to_success,
    without_times,
)

FIRST: Final = "2026-03-01T12:00:00Z"
REFUSED: Final = make_termination_message(Reason.DATASET_INVALID, "spec.dataset.uri: row 1: no field")
OUT_OF_MEMORY: Final = make_termination_message(Reason.CUDA_OUT_OF_MEMORY, "CUDA out of memory")


def submitted(**change: Any) -> FakeCluster:
    cluster = FakeCluster()
    cluster.submit(make_manifest(**change))
    return cluster


async def fail_preparation(cluster: FakeCluster) -> None:
    await reconcile_until_stable(cluster)
    cluster.end_pod(newest_preparation(cluster), 1, REFUSED)
    await reconcile_until_stable(cluster)
    assert (cluster.status["phase"], cluster.status["reason"]) == ("Failed", "DatasetInvalid")


async def fail_attempt(cluster: FakeCluster, number: int) -> None:
    """One attempt starts and runs out of memory; the back-off before the next one passes."""
    train = names.train_job_name(REF.name, number)
    cluster.start_pod(train)
    await reconcile_until_stable(cluster)
    cluster.end_pod(train, 1, OUT_OF_MEMORY)
    await reconcile_until_stable(cluster)
    cluster.pass_time(LONGEST_PAUSE)
    await reconcile_until_stable(cluster)


async def prepare(cluster: FakeCluster) -> None:
    await reconcile_until_stable(cluster)
    cluster.end_pod(newest_preparation(cluster), 0, PREPARED_MESSAGE)
    await reconcile_until_stable(cluster)


async def exhaust_retries(cluster: FakeCluster) -> None:
    await prepare(cluster)
    await fail_attempt(cluster, 1)
    await fail_attempt(cluster, 2)
    assert (cluster.status["phase"], cluster.status["reason"]) == ("Failed", "RetriesExhausted")


async def request_retry(cluster: FakeCluster, value: str = FIRST) -> None:
    cluster.annotate(names.RETRY_ANNOTATION, value)
    await reconcile_until_stable(cluster)


def attempts(cluster: FakeCluster) -> list[tuple[int, str | None]]:
    return [(attempt["number"], attempt.get("reason")) for attempt in cluster.status["attempts"]]


async def test_run_that_failed_in_preparation_is_prepared_again() -> None:
    cluster = submitted()
    await fail_preparation(cluster)
    await request_retry(cluster)
    assert (cluster.status["phase"], cluster.status["reason"]) == ("Preparing", "Preparing")
    assert "finishedAt" not in cluster.status
    assert newest_preparation(cluster) == PREPARE_AGAIN
    conditions = {kind: cluster.condition(kind) for kind in ("Ready", "Reconciling", "Stalled", "Finished")}
    assert conditions == {"Ready": "False", "Reconciling": "True", "Stalled": "False", "Finished": "False"}
    await run_to_success(cluster)
    assert cluster.status["phase"] == "Succeeded"


async def test_retry_continues_attempts_and_starts_budgets_anew() -> None:
    cluster = submitted(retries={"maxAttempts": 2})
    await exhaust_retries(cluster)
    await request_retry(cluster)
    assert cluster.status["retry"] == {
        "request": FIRST, "pending": False, "afterAttempt": 2, "time": cluster.status["retry"]["time"],
    }  # fmt: skip
    await prepare(cluster)
    await fail_attempt(cluster, 3)
    assert cluster.status["phase"] == Phase.SCHEDULING, "the first of two attempts since the retry"
    await fail_attempt(cluster, 4)
    assert (cluster.status["phase"], cluster.status["reason"]) == ("Failed", "RetriesExhausted")
    assert attempts(cluster) == [(number, "CudaOutOfMemory") for number in (1, 2, 3, 4)]


async def test_retry_resets_total_deadline() -> None:
    cluster = submitted(retries={"maxAttempts": 1}, deadlines={"total": "2h"})
    await prepare(cluster)
    cluster.start_pod(TRAIN)
    await reconcile_until_stable(cluster)
    cluster.pass_time(timedelta(minutes=110))
    cluster.end_pod(TRAIN, 1, OUT_OF_MEMORY, keep_start=True)
    await reconcile_until_stable(cluster)
    await request_retry(cluster)
    await prepare(cluster)
    second = names.train_job_name(REF.name, 2)
    cluster.start_pod(second)
    await reconcile_until_stable(cluster)
    limit = cluster.children["Job", second]["spec"]["activeDeadlineSeconds"] - SAFETY_MARGIN.total_seconds()
    assert 7200 <= limit < 7260


async def test_same_request_is_carried_out_once_and_another_again() -> None:
    cluster = submitted()
    for value in (FIRST, "again"):
        await fail_preparation(cluster)
        await request_retry(cluster, value)
        assert cluster.status["phase"] == "Preparing"
    await fail_preparation(cluster)
    await request_retry(cluster, "again")
    assert (cluster.status["phase"], newest_preparation(cluster)) == ("Failed", f"{REF.name}-prep3")


async def test_long_request_is_recorded_within_the_bounds_of_the_status() -> None:
    cluster = submitted()
    await fail_preparation(cluster)
    await request_retry(cluster, "x" * 300_000)
    assert cluster.status["phase"] == "Preparing"
    assert len(cluster.status["retry"]["request"]) == 64
    await fail_preparation(cluster)
    await request_retry(cluster, "x" * 299_999)
    assert cluster.status["phase"] == "Preparing"


async def test_retry_of_succeeded_run_only_says_so() -> None:
    cluster = submitted()
    await run_to_success(cluster)
    before, children = cluster.status, set(cluster.children)
    await request_retry(cluster)
    assert {key: value for key, value in cluster.status.items() if key != "retry"} == before
    assert set(cluster.children) == children
    [event] = [event for event in cluster.events.values() if names.RETRY_ANNOTATION in event["note"]]
    assert event["note"].endswith("has no effect: the run has succeeded; to train again: qlora rerun --overwrite")


async def test_request_during_run_has_no_effect_and_says_so() -> None:
    cluster = submitted()
    await reconcile_until_stable(cluster)
    await request_retry(cluster)
    [event] = [event for event in cluster.events.values() if names.RETRY_ANNOTATION in event["note"]]
    assert "has no effect: the run has not ended" in event["note"]
    await fail_preparation(cluster)
    assert cluster.created.count(PREPARE) == 2, "a Job and a ConfigMap"


async def test_annotation_from_creation_on_is_no_request() -> None:
    cluster = submitted()
    cluster.annotate(names.RETRY_ANNOTATION, FIRST)
    await fail_preparation(cluster)
    assert [event["note"] for event in cluster.events.values() if names.RETRY_ANNOTATION in event["note"]] == []
    await request_retry(cluster, "2026-03-02T12:00:00Z")
    assert cluster.status["phase"] == "Preparing"


async def test_suspended_run_is_retried_when_it_is_resumed() -> None:
    cluster = submitted()
    await fail_preparation(cluster)
    cluster.change(suspend=True)
    await request_retry(cluster)
    assert cluster.status["phase"] == "Suspended"
    cluster.change(suspend=False)
    await reconcile_until_stable(cluster)
    assert cluster.status["phase"] == "Preparing"


async def test_removed_request_is_not_carried_out() -> None:
    cluster = submitted()
    await fail_preparation(cluster)
    cluster.annotate(names.RETRY_ANNOTATION, FIRST)
    cluster.crash_after = lambda number: number == 1 + len(cluster.writes)
    assert cluster.job
    del cluster.job["metadata"]["annotations"]
    await reconcile_until_stable(cluster)
    assert cluster.status["phase"] == "Failed"


async def retried_life(cluster: FakeCluster) -> None:
    await fail_preparation(cluster)
    cluster.annotate(names.RETRY_ANNOTATION, FIRST)
    await run_to_success(cluster)


@pytest.mark.parametrize("write", range(8, 24))
async def test_crash_during_retry_same_outcome(write: int) -> None:
    quiet, crashing = submitted(), submitted()
    crashing.crash_after = lambda number: number == write
    await retried_life(quiet)
    await retried_life(crashing)
    ignored = without_times(quiet.status).replace(quiet.status["retry"]["time"], "")
    assert without_times(crashing.status).replace(crashing.status["retry"]["time"], "") == ignored
    assert crashing.created == quiet.created


class OldCrdCluster(FakeCluster):
    """A cluster whose CRD has no status.retry yet; a write that changes nothing is none."""

    async def write_status(self, job: RawJob, status: dict[str, Any]) -> str:
        stored = {key: value for key, value in status.items() if key != "retry"}
        return job.resource_version if stored == job.status else await super().write_status(job, stored)


async def test_request_that_cannot_be_recorded_is_not_repeated_for_ever() -> None:
    cluster = OldCrdCluster()
    cluster.submit(make_manifest())
    await fail_preparation(cluster)
    cluster.annotate(names.RETRY_ANNOTATION, FIRST)
    await reconcile_until_stable(cluster)
    assert (await reconcile_now(cluster)).requeue_after is None
    assert (cluster.status["phase"], cluster.created.count(PREPARE)) == ("Failed", 2)


async def test_stale_view_of_failed_run_deletes_nothing_of_its_retry() -> None:
    cluster = submitted(retries={"maxAttempts": 1}, ttl="1h")
    await prepare(cluster)
    await fail_attempt(cluster, 1)
    assert cluster.job
    failed = parse_job({**cluster.job, "metadata": dict(cluster.job["metadata"]), "status": dict(cluster.status)})
    await request_retry(cluster)
    await prepare(cluster)
    second = names.train_job_name(REF.name, 2)
    cluster.start_pod(second)
    await reconcile_until_stable(cluster)
    context = ReconcileContext(cluster.now + timedelta(days=1))
    assert await reconcile_once(failed, cluster, INSTALLATION, context, from_cache=True) is None
    assert ("Job", second) in cluster.children


async def test_history_of_attempts_stays_within_the_bounds_of_the_status() -> None:
    cluster = submitted(retries={"maxAttempts": 1})
    await prepare(cluster)
    await fail_attempt(cluster, 1)
    assert cluster.job
    [ended] = cluster.status["attempts"]
    history = [
        {**ended, "number": number, "job": f"{REF.name}-{number}"} for number in range(1, MAX_ATTEMPTS_LISTED + 1)
    ]
    cluster.job["status"] = {**cluster.status, "attempts": history, "attempt": MAX_ATTEMPTS_LISTED}
    await request_retry(cluster)
    await prepare(cluster)
    last = names.train_job_name(REF.name, MAX_ATTEMPTS_LISTED + 1)
    cluster.start_pod(last)
    await reconcile_until_stable(cluster)
    cluster.end_pod(last, 0, PUBLISHED_MESSAGE)
    await reconcile_until_stable(cluster)
    assert cluster.status["phase"] == "Succeeded"
    assert [number for number, _ in attempts(cluster)] == [1, *range(3, MAX_ATTEMPTS_LISTED + 2)]
