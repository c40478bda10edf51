"""Any history of queues, quotas, preemptions, full clusters and suspensions: waiting never fails a run, nor counts."""

import asyncio
from collections.abc import Callable
from datetime import timedelta
from typing import Final

from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_api.reasons import Reason
from tests.make import PREPARED_MESSAGE, PUBLISHED_MESSAGE, make_termination_message
from tests.unit.operator.lifecycle.test_waiting import container_seconds
from tests.unit.operator.simulation import Simulation

STARTUP: Final = timedelta(minutes=30)
STEP: Final = timedelta(seconds=30)
COUNTED_WRONG: Final = 2 * STEP
"""By how much each start may be miscounted in steps of this length."""
HARMLESS: Final = {None, "Interrupted", "SuspendedByUser", "PodLost", "S3Unavailable", "StartupDeadlineExceeded"}
"""How attempts may end in these histories."""


def last_job(run: Simulation) -> str:
    return max(run.jobs, key=lambda name: (name.rpartition("-")[2].isdigit(), name))


def admit(run: Simulation) -> None:
    for name in run.jobs:
        run.kubernetes.admit(name)


def preempt(run: Simulation) -> None:
    job = last_job(run) if run.jobs else ""
    if job.rpartition("-")[2].isdigit():
        run.kubernetes.preempt(job, "Preempted to accommodate a workload")


def end_what_runs(run: Simulation, code: int, message: str) -> None:
    for name in run.jobs:
        if run.kubernetes.runs(name) and name.rpartition("-")[2].isdigit():
            run.kubernetes.end_trainer(name, code, message)


ACTS: Final[dict[str, Callable[[Simulation], None]]] = {
    "nothing": lambda _: None,
    "admitted": admit,
    "preempted": preempt,
    "suspended": lambda run: run.cluster.change(suspend=True),
    "resumed": lambda run: run.cluster.change(suspend=False),
    "cluster is full": lambda run: setattr(run.kubernetes, "nodes", 0),
    "one node is free": lambda run: setattr(run.kubernetes, "nodes", 1),
    "nodes are free": lambda run: setattr(run.kubernetes, "nodes", 100),
    "quota is full": lambda run: setattr(run.kubernetes, "refusal", "exceeded quota"),
    "quota has room": lambda run: setattr(run.kubernetes, "refusal", ""),
    "pods are created slowly": lambda run: setattr(run.kubernetes, "pods_per_step", 1),
    "image is far": lambda run: setattr(run.kubernetes, "pull_time", timedelta(minutes=10)),
    "pods stop slowly": lambda run: setattr(run.kubernetes, "stop_time", timedelta(seconds=55)),
    "trainer is interrupted": lambda run: end_what_runs(
        run, 143, make_termination_message(Reason.INTERRUPTED, "asked to stop")
    ),
    "service is away": lambda run: end_what_runs(run, 1, make_termination_message(Reason.S3_UNAVAILABLE, "503")),
}
HISTORIES: Final = st.lists(
    st.tuples(st.sampled_from(sorted(ACTS)), st.sampled_from([0, 1, 2, 7, 50, 400])), min_size=3, max_size=14
)
"""What happens, and for how many steps nothing else does."""


@settings(max_examples=25, deadline=None, derandomize=True)
@given(history=HISTORIES, nodes=st.sampled_from([1, 2]), queued=st.booleans())
def test_no_history_of_waiting_fails_a_run(history: list[tuple[str, int]], nodes: int, queued: bool) -> None:
    asyncio.run(check_history(history, nodes, queued=queued))


async def check_history(history: list[tuple[str, int]], nodes: int, *, queued: bool) -> None:
    queue = {"queue": {"name": "gpus"}} if queued else {}
    run = Simulation(
        resources={"nodes": nodes, "gpusPerNode": 0}, training={"globalBatchSize": 16},
        deadlines={"total": "1000h"}, retries={"maxAttempts": 20}, **queue,
    )  # fmt: skip
    for act, steps in (("nothing", 2), *history):
        ACTS[act](run)
        await run.react()
        for _ in range(steps):
            await run.run(STEP, STEP)
            if run.kubernetes.runs("support-bot-prepare"):
                run.kubernetes.end_trainer("support-bot-prepare", 0, PREPARED_MESSAGE)
    assert set(run.ends) <= HARMLESS, run.status["attempts"]
    if run.status["phase"] == "Failed":
        assert run.status["reason"] == "StartupDeadlineExceeded", run.status["message"]  # a gang in parts
        assert nodes > 1 or "image is far" in {act for act, _ in history}
    if run.ends:
        check_counted_time(run, starts=len(history) + 1)
    for kind in ("nodes are free", "quota has room", "resumed"):
        ACTS[kind](run)
    run.kubernetes.pull_time = timedelta(0)
    await check_end(run)


def check_counted_time(run: Simulation, starts: int) -> None:
    """Only container time counts, and all of it that nobody asked to stop."""
    counted = timedelta(seconds=container_seconds(run))
    assert counted <= run.kubernetes.ran + run.kubernetes.ran_while_stopping + COUNTED_WRONG
    assert counted >= run.kubernetes.ran - starts * COUNTED_WRONG


async def check_end(run: Simulation) -> None:
    """Once nothing is in its way, the run trains and publishes."""
    for _ in range(60):
        if run.status["phase"] in {"Succeeded", "Failed"}:
            return
        admit(run)
        await run.run(STEP, STEP)
        if run.kubernetes.runs("support-bot-prepare"):
            run.kubernetes.end_trainer("support-bot-prepare", 0, PREPARED_MESSAGE)
        end_what_runs(run, 0, PUBLISHED_MESSAGE)
    raise AssertionError(f"it never ends: {run.status['message']}")
