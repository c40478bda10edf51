"""Every GPU-second of every pod is accounted, once, and belongs to one part."""

import asyncio
from datetime import datetime, timedelta
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_api.names import Phase, Role
from qlora_api.reasons import Reason
from qlora_api.v1alpha1 import Attempt, AttemptUsage, GpuUsage, Progress, QLoRAJobStatus
from qlora_api.v1alpha1.usage import PARTS
from qlora_operator.lifecycle.usage import account, is_uncertain
from qlora_operator.models import ChildJob, Exit, Observation, Pod
from qlora_operator.status import to_wire
from tests.make import NOW, PREPARED_MESSAGE, make_child, make_pending_pod, make_plan_status, make_pod
from tests.unit.operator.controller.test_reconcile import gpu_node
from tests.unit.operator.life import reconcile_now
from tests.unit.operator.lifecycle.test_histories import ACTS, HISTORIES, STEP, check_end
from tests.unit.operator.simulation import Simulation, train

GPUS: Final = 4
GANG: Final = make_plan_status().model_copy(update={"nodes": 2, "gpus_per_node": GPUS})
START: Final = NOW - timedelta(hours=1)


def at(seconds: int) -> datetime:
    return START + timedelta(seconds=seconds)


def pod_of(uid: str, bound: int, started: int | None = None, ended: int | None = None, **change: Any) -> Pod:
    """A pod with its times in seconds after START."""
    values: dict[str, Any] = {
        "uid": uid,
        "name": uid,
        "created_at": at(bound),
        "scheduled_at": at(bound),
        "started_at": None if started is None else at(started),
        "phase": "Pending" if started is None else "Running",
    }
    if ended is not None:
        values |= {"phase": "Failed", "exit": Exit(1, finished_at=at(ended)), "released_at": at(ended)}
    return make_pod(**values | change)


def report_at(seconds: int, step: int | None = None, phase: Phase = Phase.TRAINING) -> Progress:
    return Progress(step=step, loss=None if step is None else 1.0, phase=phase, updated_at=at(seconds))


def child_of(*pods: Pod, **change: Any) -> ChildJob:
    return make_child(**{"pods": pods, "pod": None, "completions": len(pods), **change})


class Book:
    """The status of a run from pass to pass, as it is stored in between."""

    def __init__(self) -> None:
        self.status = QLoRAJobStatus(plan=GANG, attempts=(Attempt(number=1, job="a-1"),))

    @property
    def usage(self) -> GpuUsage:
        assert self.status.usage
        return self.status.usage

    def account(
        self, seconds: int, *children: ChildJob, report: Progress | None = None, watched: bool = True, **attempt: Any
    ) -> dict[str, int]:
        """Account at a time what is observed; return the parts in pod-seconds."""
        last = self.status.attempts[-1]
        following = self.status.model_copy(
            update={
                "attempts": (*self.status.attempts[:-1], last.model_copy(update=attempt)),
                "last_report": report or self.status.last_report,
            }
        )
        status = account(self.status, following, Observation(children), report, watched=watched, now=at(seconds))
        self.status = QLoRAJobStatus.model_validate(to_wire(status))
        return parts_of(self.status)

    def begin(self, number: int) -> None:
        self.status = self.status.model_copy(
            update={"attempts": (*self.status.attempts, Attempt(number=number, job=f"a-{number}"))}
        )


def parts_of(status: QLoRAJobStatus) -> dict[str, int]:
    usage = status.usage
    if usage is None:
        return {}
    assert sum(getattr(usage, part) for part in PARTS) == usage.held == usage.pod_seconds * GPUS
    return {part: value // GPUS for part in PARTS if (value := getattr(usage, part))}


# What is held, and for what


def test_pod_holds_its_gpus_from_its_node_to_its_end() -> None:
    book = Book()
    assert book.account(5, child_of(make_pending_pod())) == {}
    assert book.account(10, child_of(pod_of("a", 10))) == {}
    assert book.status.gpus == GPUS
    assert book.account(40, child_of(pod_of("a", 10, 40))) == {"starting": 30}
    loading = report_at(45)
    assert book.account(45, child_of(pod_of("a", 10, 40)), report=loading) == {"starting": 35}
    base = report_at(60, phase=Phase.EVALUATING)
    assert book.account(60, child_of(pod_of("a", 10, 40)), report=base) == {"starting": 50}
    first = report_at(90, step=1)
    assert book.account(90, child_of(pod_of("a", 10, 40)), report=first) == {"starting": 50, "evaluating": 30}
    last = report_at(190, step=50, phase=Phase.PUBLISHING)
    expected = {"starting": 50, "evaluating": 30, "training": 100}
    assert book.account(190, child_of(pod_of("a", 10, 40)), report=last) == expected
    assert book.account(215, child_of(pod_of("a", 10, 40, 210))) == expected | {"publishing": 20}
    assert (book.status.gpus, book.usage.since, book.usage.until) == (0, at(10), at(210))
    assert book.account(900, child_of(pod_of("a", 10, 40, 210))) == expected | {"publishing": 20}


def test_pod_whose_image_is_pulled_is_starting() -> None:
    book = Book()
    book.account(10, child_of(pod_of("a", 10)))
    assert book.account(1810, child_of(pod_of("a", 10, phase="Failed", released_at=at(1800)))) == {"starting": 1790}


def test_pods_that_wait_for_a_node_of_another_are_idle() -> None:
    book, pending = Book(), make_pending_pod(index=1)
    assert book.account(10, child_of(pod_of("a", 10), pending)) == {}
    gang = (pod_of("a", 10, 20), pod_of("b", 110, 120, index=1))
    assert book.account(120, child_of(*gang)) == {"idle": 100, "starting": 10}
    assert book.status.gpus == 2 * GPUS


def test_gang_that_is_never_complete_is_idle() -> None:
    book, pending = Book(), make_pending_pod(index=1)
    book.account(10, child_of(pod_of("a", 10, 20), pending))
    assert book.account(1900, child_of(pod_of("a", 10, 20, 1810), pending)) == {"idle": 1800}


def test_sidecar_that_outlives_the_trainer_is_idle() -> None:
    book = Book()
    book.account(10, child_of(pod_of("a", 10, 20)))
    ended = pod_of("a", 10, 20, exit=Exit(0, finished_at=at(120)))
    assert book.account(121, child_of(ended)) == {"starting": 110}
    assert book.status.gpus == GPUS
    gone = pod_of("a", 10, 20, phase="Succeeded", exit=Exit(0, finished_at=at(120)), released_at=at(150))
    assert book.account(151, child_of(gone)) == {"starting": 110, "idle": 30}


def test_hung_run_is_idle_since_its_last_report() -> None:
    book, hung = Book(), pod_of("a", 10, 20)
    book.account(20, child_of(hung))
    book.account(40, child_of(hung), report=report_at(40, 5))
    book.account(640, child_of(hung), reason=Reason.HEARTBEAT_LOST)
    ended = pod_of("a", 10, 20, 650)
    assert book.account(651, child_of(ended)) == {"starting": 30, "idle": 610}


def test_steps_after_the_last_checkpoint_are_repeated_once() -> None:
    book, first = Book(), pod_of("a", 0, 10)
    book.account(10, child_of(first))
    book.account(20, child_of(first), report=report_at(20, 1))
    book.account(120, child_of(first), report=report_at(120, 100))
    book.account(121, child_of(pod_of("a", 0, 10, 120)), reason=Reason.INTERRUPTED)
    book.begin(2)
    second = pod_of("b", 200, 210)
    expected = {"starting": 20, "training": 100}
    book.account(210, child_of(second, attempt=2))
    expected["starting"] += 30
    assert book.account(230, child_of(second, attempt=2), report=report_at(230, 60)) == expected
    expected["repeated"] = 20
    assert book.account(250, child_of(second, attempt=2), report=report_at(250, 80)) == expected
    expected |= {"repeated": 40, "training": 140}
    assert book.account(310, child_of(second, attempt=2), report=report_at(310, 140)) == expected
    assert book.account(320, child_of(pod_of("b", 200, 210, 320), attempt=2)) == expected | {"training": 150}


# Pods that nobody sees end


@pytest.mark.parametrize(
    ("watched", "expected"), [pytest.param(True, 290, id="watched"), pytest.param(False, 90, id="operator-was-away")]
)
def test_pod_that_is_gone_held_until_then_or_until_its_last_report(watched: bool, expected: int) -> None:
    book = Book()
    book.account(20, child_of(pod_of("a", 10, 20)))
    book.account(100, child_of(pod_of("a", 10, 20)), report=report_at(100, 5))
    book.account(300, watched=watched)
    assert (book.usage.pod_seconds, book.status.gpus) == (expected, 0)


def test_pod_on_a_dead_node_holds_until_it_should_have_ended() -> None:
    book = Book()
    book.account(20, child_of(pod_of("a", 10, 20)))
    dead = pod_of("a", 10, 20, deleting=True, deletion_timestamp=at(400))
    book.account(420, child_of(dead), reason=Reason.NODE_LOST)
    assert book.status.gpus == GPUS
    for seconds in (430, 90_000):
        assert book.account(seconds, child_of(dead)) == {"starting": 420}
    assert book.status.gpus == 0
    assert book.account(90_100) == {"starting": 420}


def test_pod_that_ended_while_the_operator_was_away_is_accounted_by_its_times() -> None:
    book = Book()
    book.account(900, child_of(pod_of("a", 10, 20, 510)), reason=Reason.TRAINER_ERROR)
    assert book.usage.pod_seconds == 500


def test_pod_that_ended_at_an_unknown_time_held_until_that_is_seen() -> None:
    book = Book()
    book.account(10, child_of(pod_of("a", 10)))
    refused = pod_of("a", 10, phase="Failed", reason="UnexpectedAdmissionError")
    assert book.account(15, child_of(refused)) == {"starting": 5}
    after = book.status
    book.account(900, child_of(refused))
    assert book.status == after, "nothing more to write"
    unseen = Book()
    assert unseen.account(900, child_of(refused)) == {}
    after = unseen.status
    unseen.account(990, child_of(refused))
    assert unseen.status == after


@pytest.mark.parametrize("ahead", [-3600, -30, 30, 3600])
def test_pod_on_a_node_with_a_wrong_clock_counts_once(ahead: int) -> None:
    book = Book()
    book.account(10, child_of(pod_of("a", 10)))
    running = pod_of("a", 10, 20 + ahead)
    book.account(21, child_of(running))
    before = book.status
    book.account(25, child_of(running))
    assert book.status == before, "nothing new is known"
    ended = pod_of("a", 10, 20 + ahead, 120 + ahead)
    book.account(121, child_of(ended))
    held = book.usage.pod_seconds
    assert 110 - min(abs(ahead), 10) <= held <= 111
    for seconds in (122, 130, 3700, 4000):
        book.account(seconds, child_of(ended))
        assert book.usage.pod_seconds == held


def test_replaced_and_earlier_pods_count_once() -> None:
    book = Book()
    book.account(20, child_of(pod_of("a", 10, 20)))
    old, new = pod_of("a", 10, 20, 110), pod_of("b", 120, 130)
    for seconds in (130, 131, 132):
        book.account(seconds, child_of(new, completions=1, replaced_pods=(old,)))
        assert book.usage.pod_seconds == 110
    third = pod_of("c", 300, 310, 400)
    stopped = pod_of("b", 120, 130, 290)
    for seconds in (401, 402):
        book.account(seconds, child_of(third, completions=1, earlier_pods=(stopped,), replaced_pods=(old,)))
        assert book.usage.pod_seconds == 100 + 170 + 100


def test_attempt_of_an_earlier_version_is_left_without_usage() -> None:
    book = Book()
    book.status = book.status.model_copy(
        update={"attempts": (Attempt(number=1, job="a-1", reason=Reason.INTERRUPTED),), "gpus": 0}
    )
    assert book.account(900, child_of(pod_of("a", 10, 20, 510))) == {}
    assert book.status.usage is None


def test_gpus_of_an_attempt_whose_pods_went_during_an_upgrade_are_not_held() -> None:
    book = Book()
    book.status = book.status.model_copy(update={"gpus": 4})
    book.account(900)
    assert book.status.gpus == 0


@pytest.mark.parametrize(
    ("pods", "gpus"),
    [
        ((make_pending_pod(), make_pending_pod(index=1)), None),
        ((make_pod(), make_pending_pod(index=1)), 4),
        ((make_pod(), make_pod(index=1), make_pod(index=2)), 12),
        ((make_pod(), make_pod(index=1, deleting=True)), 8),
        ((make_pod(phase="Succeeded"), make_pod(index=1, phase="Failed"), make_pod(index=2)), 4),
    ],
)
def test_gpus_are_those_that_pods_on_nodes_hold(pods: tuple[Pod, ...], gpus: int | None) -> None:
    book = Book()
    book.account(3600, child_of(*pods))
    assert book.status.gpus == gpus


def test_preparation_and_run_without_plan_hold_no_gpu() -> None:
    book = Book()
    book.account(3600, make_child(Role.PREPARE))
    assert (book.status.gpus, book.status.usage) == (None, None)
    without_plan = book.status.model_copy(update={"plan": None})
    status = account(without_plan, without_plan, Observation((make_child(),)), None, watched=True, now=NOW)
    assert status.gpus == 0


def test_stale_cache_is_not_believed() -> None:
    book, running = Book(), child_of(pod_of("a", 10, 20))
    assert not is_uncertain(book.status, Observation((running,)), at(20))
    book.account(20, running)
    assert not is_uncertain(book.status, Observation((running,)), at(30))
    assert is_uncertain(book.status, Observation(), at(30)), "the pod is not in the cache yet, or gone"
    book.account(101, child_of(pod_of("a", 10, 20, 100)))
    assert is_uncertain(book.status, Observation((running,)), at(101)), "its end is not in the cache yet"
    assert not is_uncertain(book.status, Observation((child_of(pod_of("a", 10, 20, 100)),)), at(101))


# Generated histories

SECONDS: Final = st.integers(0, 400)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    pods=st.lists(st.tuples(SECONDS, SECONDS, SECONDS, SECONDS, st.booleans()), min_size=1, max_size=4),
    reports=st.lists(st.tuples(st.integers(0, 1600), st.integers(0, 300), st.sampled_from(
        [Phase.TRAINING, Phase.EVALUATING, Phase.PUBLISHING])), max_size=8),
    passes=st.lists(st.integers(0, 1600), min_size=1, max_size=12),
)  # fmt: skip
def test_parts_add_up_to_what_pods_held_and_never_decrease(
    pods: list[tuple[int, int, int, int, bool]],
    reports: list[tuple[int, int, Phase]],
    passes: list[int],
) -> None:
    """Each pod is bound, starts, exits and ends; passes see it as it is then, or not at all."""
    book, before, seen = Book(), 0, 0
    times = [(a, a + b, a + b + c, a + b + c + d) for a, b, c, d, _ in pods]
    for now in (*sorted(passes), 2000):
        visible = [_pod_at(index, moments, now) for index, moments in enumerate(times)]
        child = child_of(*(pod for pod in visible if pod), completions=len(pods))
        heard = [report_at(*report) for report in sorted(reports, key=lambda item: item[0]) if report[0] <= now]
        parts = book.account(now, child, report=heard[-1] if heard else None)
        held = book.usage.pod_seconds if book.status.usage else 0
        assert sum(parts.values()) == held >= before
        seen = sum(max(min(end, now) - bound, 0) for bound, _, _, end in times)
        assert held <= seen
        before = held
    assert before == seen, "the union of what pods held"


def _pod_at(index: int, times: tuple[int, int, int, int], now: int) -> Pod | None:
    bound, started, exited, ended = times
    if now < bound:
        return make_pending_pod(index=index, uid=f"pod-{index}")
    change: dict[str, Any] = {"index": index}
    if now >= exited:
        change |= {"exit": Exit(0, finished_at=at(exited)), "phase": "Running"}
    if now >= ended:
        change |= {"phase": "Succeeded", "released_at": at(ended)}
    return pod_of(f"pod-{index}", bound, started if now >= started else None, **change)


class AccountedSimulation(Simulation):
    """Checks after each pass that nothing was taken back."""

    def __init__(self, **spec: Any) -> None:
        super().__init__(**spec)
        self.before = GpuUsage()

    async def react(self) -> None:
        await super().react()
        usage = QLoRAJobStatus.model_validate(self.status).usage or GpuUsage()
        for name in ("pod_seconds", "held", *PARTS):
            assert getattr(usage, name) >= getattr(self.before, name), name
        assert sum(getattr(usage, part) for part in PARTS) == usage.held
        self.before = usage


@settings(max_examples=15, deadline=None, derandomize=True)
@given(history=HISTORIES, nodes=st.sampled_from([1, 2]), queued=st.booleans(), sidecar=st.booleans())
def test_any_history_accounts_what_was_held(
    history: list[tuple[str, int]], nodes: int, queued: bool, sidecar: bool
) -> None:
    asyncio.run(check_usage(history, nodes, queued=queued, sidecar=sidecar))


async def check_usage(history: list[tuple[str, int]], nodes: int, *, queued: bool, sidecar: bool) -> None:
    queue = {"queue": {"name": "gpus"}} if queued else {}
    run = AccountedSimulation(
        resources={"nodes": nodes, "gpusPerNode": 2}, training={"globalBatchSize": 16},
        deadlines={"total": "1000h"}, retries={"maxAttempts": 20}, **queue,
    )  # fmt: skip
    run.cluster.nodes = [gpu_node("NVIDIA-A10", 23_028)]
    run.kubernetes.sidecar = sidecar
    for act, steps in (("nothing", 2), *history):
        ACTS[act](run)
        await run.react()
        for _ in range(steps):
            await run.run(STEP, STEP)
            if run.kubernetes.runs("support-bot-prepare"):
                run.kubernetes.end_trainer("support-bot-prepare", 0, PREPARED_MESSAGE)
            if any(run.kubernetes.runs(name) for name in run.jobs if name.rpartition("-")[2].isdigit()):
                run.heartbeat()
    for kind in ("nodes are free", "quota has room", "resumed"):
        ACTS[kind](run)
    run.kubernetes.pull_time = timedelta(0)
    await check_end(run)
    await run.run(timedelta(minutes=10), STEP)
    held = run.status.get("usage", {}).get("podSeconds", 0)
    assert held == run.kubernetes.held.total_seconds(), run.status["attempts"]
    assert run.status["gpus"] == 0
    assert not any(attempt["usage"]["holding"] for attempt in run.status["attempts"] if "usage" in attempt)


async def test_attempts_that_are_no_longer_listed_stay_in_the_sum() -> None:
    run = Simulation(resources={"gpusPerNode": 2}, retries={"maxAttempts": 20}, deadlines={"total": "1000h"})
    run.cluster.nodes = [gpu_node("NVIDIA-A10", 23_028)]
    await run.prepare()
    last = 105
    for number in range(1, last + 1):
        while not run.kubernetes.runs(train(number)):
            await run.run(STEP, STEP)
        await run.run(STEP, STEP)
        run.cluster.change(suspend=True)
        await run.run(2 * STEP, STEP)
        run.cluster.change(suspend=number == last)
    await run.run(timedelta(minutes=2), STEP)
    status = QLoRAJobStatus.model_validate(run.status)
    assert status.earlier_attempts
    assert status.earlier_attempts.usage
    assert status.usage
    listed = [attempt.usage for attempt in status.attempts]
    assert all(isinstance(usage, AttemptUsage) for usage in listed)
    assert status.usage.pod_seconds == run.kubernetes.held.total_seconds()


async def test_time_until_a_deleted_run_has_stopped_is_accounted() -> None:
    run = Simulation(resources={"nodes": 1, "gpusPerNode": GPUS})
    run.kubernetes.stop_time = timedelta(seconds=50)
    await run.prepare()
    await run.run(timedelta(minutes=10))
    assert run.cluster.job
    run.cluster.job["metadata"] |= {"deletionTimestamp": run.cluster.now.isoformat(), "finalizers": ["acme/audit"]}
    await reconcile_now(run.cluster)
    await run.run(timedelta(minutes=5))
    assert train(1) not in run.jobs
    assert run.status["gpus"] == 0
    assert run.status["usage"]["held"] == pytest.approx(run.kubernetes.held.total_seconds() * GPUS, abs=20 * GPUS)
