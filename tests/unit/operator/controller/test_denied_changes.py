"""A policy or webhook that denies deletions: runs are followed all the same, and no GPU is held for ever."""

from datetime import timedelta
from typing import Any, Final

import pytest

from qlora_api.reasons import Reason
from qlora_operator.cluster.interface import AdmissionDeniedError
from tests.make import PREPARED_MESSAGE, PUBLISHED_MESSAGE, make_termination_message
from tests.unit.operator.life import PREPARE, PREPARE_AGAIN, TRAIN
from tests.unit.operator.simulation import Simulation

SECOND: Final = timedelta(seconds=1)
MINUTE: Final = timedelta(minutes=1)
HOUR: Final = timedelta(hours=1)
DENIED: Final = AdmissionDeniedError("policy: keep Jobs", permanent=False)


async def start(**kubernetes: Any) -> Simulation:
    run = Simulation(resources={"gpusPerNode": 0})
    for name, value in kubernetes.items():
        setattr(run.kubernetes, name, value)
    await run.prepare()
    return run


async def test_published_run_succeeds_although_nothing_may_be_deleted() -> None:
    run = await start(sidecar=True)
    run.cluster.deletion_error = DENIED
    await run.run(5 * MINUTE)
    run.kubernetes.end_trainer(TRAIN, 0, PUBLISHED_MESSAGE)
    await run.run(2 * MINUTE)
    assert run.outcome == ("Succeeded", "Published")


async def test_denied_deletion_is_in_the_message_until_it_is_allowed() -> None:
    run = Simulation(resources={"gpusPerNode": 0})
    run.kubernetes.sidecar = True
    run.cluster.deletion_error = DENIED
    await run.prepare()
    await run.run(5 * MINUTE)
    assert run.outcome[0] == "Training"
    assert "policy: keep Jobs" in run.status["message"]
    run.cluster.deletion_error = None
    await run.run(5 * MINUTE)
    assert "policy: keep Jobs" not in run.status["message"]


async def test_second_preparation_is_taken_although_the_first_may_not_be_deleted() -> None:
    run = Simulation(resources={"gpusPerNode": 0})
    run.cluster.deletion_error = DENIED
    await run.run(MINUTE)
    run.kubernetes.end_trainer(PREPARE, 1, make_termination_message(Reason.S3_UNAVAILABLE, "503"))
    await run.run(2 * MINUTE)
    assert PREPARE_AGAIN in run.jobs
    run.kubernetes.end_trainer(PREPARE_AGAIN, 0, PREPARED_MESSAGE)
    await run.run(2 * MINUTE)
    assert TRAIN in run.jobs


async def test_pods_of_a_suspended_run_end_although_its_job_may_not_be_deleted() -> None:
    run = await start()
    run.cluster.deletion_error = DENIED
    run.cluster.change(suspend=True)
    await run.run(2 * MINUTE)
    assert run.cluster.children["Job", TRAIN]["spec"]["activeDeadlineSeconds"] == 1
    assert not run.kubernetes.runs(TRAIN)


async def test_suspended_run_says_that_neither_deletion_nor_deadline_is_allowed() -> None:
    run = await start()
    run.cluster.deletion_error = DENIED
    run.cluster.update_error = AdmissionDeniedError("policy: frozen", permanent=False)
    run.cluster.change(suspend=True)
    await run.run(2 * MINUTE)
    assert "policy: keep Jobs" in run.status["message"]
    run.cluster.deletion_error = run.cluster.update_error = None
    await run.run(2 * MINUTE)
    assert run.outcome[0] == "Suspended"
    assert not run.kubernetes.runs(TRAIN)


@pytest.mark.parametrize("after", [SECOND, HOUR])
async def test_deletion_that_is_denied_for_some_time_is_repeated(after: timedelta) -> None:
    run = await start(sidecar=True)
    run.cluster.deletion_error = DENIED
    run.kubernetes.end_trainer(TRAIN, 0, PUBLISHED_MESSAGE)
    await run.run(after, min(after, MINUTE))
    run.cluster.deletion_error = None
    await run.run(5 * MINUTE)
    assert TRAIN not in run.jobs
