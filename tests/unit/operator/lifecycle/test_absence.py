"""An operator that was away finds what ended meanwhile: its absence counts neither as training nor as GPU time."""

import asyncio
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_api.reasons import Reason
from qlora_api.v1alpha1 import Progress
from tests.fakes import wire_time
from tests.make import PUBLISHED_MESSAGE, make_termination_message
from tests.unit.operator.life import TRAIN, reconcile_now
from tests.unit.operator.lifecycle.test_waiting import container_seconds
from tests.unit.operator.simulation import Simulation, train

MINUTE: Final = timedelta(minutes=1)
EPOCH: Final = "1970-01-01T00:00:00Z"
"""startedAt of a container that containerd did not start."""
COUNTED_WRONG: Final = 3 * MINUTE
"""The pod is seen to run some steps late, and ends between two steps."""


def set_status(run: Simulation, *conditions: dict[str, str], **status: Any) -> None:
    [pod] = run.cluster.pods_of(TRAIN)
    pod["status"] = {"phase": "Failed", "conditions": [*pod["status"]["conditions"], *conditions], **status}
    run.cluster.finish_job(TRAIN, "Failed")


def set_terminated(run: Simulation, **terminated: Any) -> None:
    set_status(run, containerStatuses=[{"name": "trainer", "state": {"terminated": terminated}}])


def remove_pod(run: Simulation) -> None:
    [pod] = run.cluster.pods_of(TRAIN)
    del run.cluster.pods[pod["metadata"]["name"]]
    run.cluster.finish_job(TRAIN, "Failed")


def complete_without_pod(run: Simulation) -> None:
    remove_pod(run)
    run.cluster.finish_job(TRAIN, "Complete")


def collect_pod(run: Simulation) -> None:
    collected = {"type": "DisruptionTarget", "status": "True", "reason": "DeletionByPodGC"}
    set_status(run, collected | {"lastTransitionTime": wire_time(run.cluster.now)})


def strand_pod(run: Simulation) -> None:
    """Its node is dead, and nobody says so: the pod is being deleted for ever."""
    run.kubernetes.immortal = True
    [pod] = run.cluster.pods_of(TRAIN)
    pod["metadata"] |= {"deletionTimestamp": wire_time(run.cluster.now), "deletionGracePeriodSeconds": 0}


def end_before_clock_is_set(run: Simulation) -> None:
    """A node without a clock starts the container in 2016; then its clock is set."""
    set_terminated(
        run, exitCode=137, reason="Error", startedAt="2016-01-01T00:00:00Z", finishedAt=wire_time(run.cluster.now)
    )


ENDS: Final[dict[str, Callable[[Simulation], None]]] = {
    "pod is gone, Job failed": remove_pod,
    "pod is gone, Job completed": complete_without_pod,
    "pod is collected with its node": collect_pod,
    "pod is stranded on a dead node": strand_pod,
    "container is lost": lambda run: set_terminated(
        run, exitCode=137, reason="ContainerStatusUnknown", startedAt=None, finishedAt=None
    ),
    "container is lost, times are zero": lambda run: set_terminated(
        run, exitCode=137, reason="ContainerStatusUnknown", startedAt=EPOCH, finishedAt=EPOCH
    ),
    "container did not start": lambda run: set_terminated(
        run, exitCode=128, reason="StartError", startedAt=EPOCH, finishedAt=wire_time(run.cluster.now)
    ),
    "pod is evicted without container status": lambda run: set_status(run, reason="Evicted", message="low on disk"),
    "node rebooted": lambda run: set_terminated(
        run, exitCode=255, reason="Unknown", startedAt=EPOCH, finishedAt=wire_time(run.cluster.now)
    ),
    "clock was set": end_before_clock_is_set,
}


async def train_until_away(end: Callable[[Simulation], None], trained: timedelta, away: timedelta) -> Simulation:
    """Train for a while, let it end as the operator goes away, and let that come back."""
    run = Simulation(resources={"gpusPerNode": 1}, deadlines={"total": "24h"})
    await run.prepare()
    await run.run(MINUTE)
    run.report = Progress(percent=5, step=50, updated_at=run.cluster.now)
    await reconcile_now(run.cluster, run.report)
    run.cluster.pass_time(trained)
    end(run)
    run.cluster.pass_time(away)
    run.report = None
    await run.run(10 * MINUTE)
    return run


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
async def test_absence_of_operator_counts_as_neither_training_nor_gpu_time(end: Callable[[Simulation], None]) -> None:
    trained = timedelta(hours=1)
    run = await train_until_away(end, trained, timedelta(hours=25))
    assert run.status["phase"] != "Failed", run.status["message"]
    attempt = run.status["attempts"][0]
    assert timedelta(seconds=attempt["containerSeconds"]) - trained <= COUNTED_WRONG
    assert timedelta(seconds=attempt["usage"]["held"]) - trained <= COUNTED_WRONG
    assert datetime.fromisoformat(attempt["finishedAt"]) < run.cluster.now - timedelta(hours=24)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(end=st.sampled_from(sorted(ENDS)), trained=st.integers(1, 30), away=st.integers(0, 3000))
def test_counted_time_does_not_depend_on_when_operator_returns(end: str, trained: int, away: int) -> None:
    run = asyncio.run(train_until_away(ENDS[end], trained * MINUTE, away * MINUTE))
    assert timedelta(seconds=container_seconds(run)) <= (trained + 10) * MINUTE + COUNTED_WRONG


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
async def test_usage_of_ended_run_never_changes(end: Callable[[Simulation], None]) -> None:
    run = await train_until_away(end, timedelta(hours=1), timedelta(0))
    for _ in range(3):
        if run.kubernetes.runs(train(2)):
            run.kubernetes.end_trainer(train(2), 0, PUBLISHED_MESSAGE)
        await run.run(10 * MINUTE, MINUTE)
        if "support-bot-prepare-2" in run.jobs and run.kubernetes.runs("support-bot-prepare-2"):
            message = make_termination_message(Reason.S3_DENIED, "no access")
            run.kubernetes.end_trainer("support-bot-prepare-2", 1, message)
    usage = run.status["usage"]
    for days in (1, 7, 30):
        run.cluster.pass_time(timedelta(days=days))
        await reconcile_now(run.cluster)
        assert run.status["usage"] == usage
        assert run.status["attempts"][0]["usage"]["held"] <= (timedelta(hours=1, minutes=5)).total_seconds()
