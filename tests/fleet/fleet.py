"""Nodes, runs, and one operator, from the first submission to the end of the last run; time passes by events only."""

import heapq
import json
from collections import Counter
from datetime import datetime, timedelta
from itertools import count
from pathlib import Path
from random import Random
from typing import Final

from qlora_api.job_ref import JobRef
from qlora_api.model_config import reduce_config
from qlora_api.names import output_root
from qlora_api.reasons import Reason
from qlora_api.v1alpha1 import Checkpoint, Progress
from qlora_operator.controller.node_failures import NodeFailures
from qlora_operator.controller.reconcile import reconcile
from qlora_operator.lifecycle import Reception, ReconcileContext
from qlora_operator.models import Manifest
from tests.cluster.services.kwok import A100, build_node
from tests.fake_kubernetes import has_ended, is_deleting
from tests.fleet.kubelets import Kubelets, Run
from tests.fleet.nodes import DOWNTIME, GPUS, UPTIME, Fault, Node, build_nodes
from tests.make import (
    DIGEST,
    INSTALLATION,
    NOW,
    PUBLISHED_MESSAGE,
    make_manifest,
    make_prepared,
    make_termination_message,
    message_for,
)

MODEL: Final = Path(__file__).parents[1] / "unit/planner/configs/llama-3.2-3b.json"
OUTPUT: Final = "s3://adapters/team-a"
CHECKPOINT_INTERVAL: Final = timedelta(minutes=20)
LIMIT: Final = timedelta(days=10)
"""No run may take longer."""
MOST_PASSES: Final = 40
"""Reconciles of one run at one moment: more would be a loop."""


class Fleet:
    """A fleet."""

    def __init__(self, nodes: int = 40, broken_per_fault: int = 2, seed: int = 1) -> None:
        self.now = NOW
        self.random = Random(seed)
        self.nodes = build_nodes(nodes, broken_per_fault)
        self.runs: list[Run] = []
        self.attempts: Counter[Fault | None] = Counter()
        """Training Jobs by the fault that ended them."""
        self.lost: Counter[Fault | None] = Counter()
        """GPU-seconds that pods held and no checkpoint has, by the fault that ended their Job."""
        self.useful = 0.0
        """GPU-seconds that checkpoints have."""
        self.passes = 0
        self._counted: set[str] = set()
        """Training Jobs that `attempts` has."""
        self._kubelets: dict[JobRef, Kubelets] = {}
        self._failures = NodeFailures()
        self._events: list[tuple[datetime, int, Run | Node]] = []
        self._planned: set[tuple[datetime, Run | Node]] = set()
        self._order = count()
        for node in self.nodes:
            if node.fault is Fault.DOWN:
                self._wake(node, NOW + self.random.random() * UPTIME)

    def submit(self, name: str, after: timedelta, work: timedelta, nodes: int = 1, gpus: int = 2) -> None:
        """Create a run some time from now."""
        run = Run(JobRef("ml", name), nodes, gpus, work, message_for(name, _prepared_message()))
        run.cluster.foreground_deletion = True
        run.cluster.nodes = [dict(build_node("any", A100, GPUS))]
        self.runs.append(run)
        self._kubelets[run.ref] = Kubelets(run, self.nodes, self.random, self._wake)
        self._wake(run, NOW + after)

    async def run_all(self) -> None:
        """Let time pass until every run has ended, and holds nothing."""
        unfinished = set(self.runs)
        while unfinished:
            self.now, _, what = heapq.heappop(self._events)
            assert self.now <= NOW + LIMIT, [run.cluster.status for run in unfinished]
            self._planned.discard((self.now, what))
            if isinstance(what, Node):
                self._switch(what)
            elif what in unfinished:
                await self._act(what)
                unfinished -= {what} if what.finished else set()

    def _wake(self, what: Run | Node, at: datetime) -> None:
        at = max(at, self.now)
        if (at, what) not in self._planned:
            self._planned.add((at, what))
            heapq.heappush(self._events, (at, next(self._order), what))

    async def _act(self, run: Run) -> None:
        """Let the controllers, the nodes and the operator act on a run until nothing changes."""
        run.cluster.now = self.now
        if run.cluster.job is None:
            resources = {"nodes": run.nodes, "gpusPerNode": run.gpus}
            run.cluster.submit(make_manifest(run.ref.name, resources=resources, training={"globalBatchSize": 16}))
        for _ in range(MOST_PASSES):
            self._kubelets[run.ref].step(timedelta(0))
            self._train(run)
            self._release(run)
            seen = _describe(run)
            if seen == run.seen and (run.due is None or self.now < run.due):
                return
            run.seen = seen
            await self._reconcile(run)
        raise AssertionError(f"reconciled {MOST_PASSES} times at one time: {run.cluster.status}")

    async def _reconcile(self, run: Run) -> None:
        self.passes += 1
        context = ReconcileContext(
            self.now, self._report(run), NOW, quarantined_nodes=self._failures.quarantined(self.now),
            bad_nodes=self._failures.quarantine_ends(self.now), reception=Reception((self.now,)),
        )  # fmt: skip
        result = await reconcile(run.ref, run.cluster, INSTALLATION, context)
        if result.status is not None:
            self._failures.update(run.ref, result.status.attempts, result.status.checkpoint)
        run.due = None if result.requeue_after is None else self.now + result.requeue_after
        if run.due is not None:
            self._wake(run, run.due)

    def _report(self, run: Run) -> Progress | None:
        """Return the last report of a pod that trains: they come every few seconds, and with each checkpoint."""
        if run.saved_at is None:
            return None
        step = int(run.saved.total_seconds())
        uri = f"{output_root(OUTPUT, run.ref.name)}/{DIGEST}/checkpoints/step-{step}"
        checkpoint = Checkpoint(step=step, uri=uri, time=run.saved_at) if step else None
        return Progress(step=step, checkpoint=checkpoint, updated_at=self.now)

    def _train(self, run: Run) -> None:
        """Write the checkpoints that are due, and publish once all is trained."""
        pods = run.training_pods()
        if len(pods) < run.nodes:
            run.saved_at = None
            return
        run.saved_at = run.saved_at or self.now
        while run.saved < run.work and self.now >= run.saved_at + (step := _next_step(run)):
            run.saved, run.saved_at, run.due = run.saved + step, run.saved_at + step, self.now
            run.saved_by[run.job_of(pods[0])] += int(step.total_seconds())
            self.useful += step.total_seconds() * run.gpus * run.nodes
        if run.saved < run.work:
            self._wake(run, run.saved_at + _next_step(run))
            return
        for pod in pods:
            self._kubelets[run.ref].plan_end(pod, timedelta(0), 0, message_for(run.ref.name, PUBLISHED_MESSAGE))

    def _release(self, run: Run) -> None:
        """Take back and count the GPUs of pods that have ended, and let pods that wait have them."""
        freed = 0
        for name, holding in list(run.holdings.items()):
            pod = run.cluster.pods.get(name)
            if pod is not None and not has_ended(pod):
                continue
            del run.holdings[name]
            holding.node.free += holding.gpus
            freed += holding.gpus
            job = name.partition("-uid-")[0].rpartition("-")[0]
            if holding.gpus and job not in self._counted:
                self._counted.add(job)
                self.attempts[run.faults.get(job)] += 1
            held = (self.now - holding.since).total_seconds() - run.saved_by[job]
            self.lost[run.faults.get(job)] += int(held * holding.gpus)
        if freed:
            self._retry_waiting()

    def _retry_waiting(self) -> None:
        """Let the scheduler try the pods again that had no room."""
        room = max((node.free for node in self.nodes if node.up), default=0)
        for run in self.runs:
            if run.gpus <= room and any(_waits(pod) for pod in run.cluster.pods.values()):
                self._wake(run, self.now)

    def _switch(self, node: Node) -> None:
        """Let a node go down, or come back."""
        node.up, node.changed_at = not node.up, self.now
        self._wake(node, self.now + (UPTIME if node.up else DOWNTIME))
        for run in self.runs:
            for name in [name for name, holding in run.holdings.items() if holding.node is node]:
                run.cluster.now = self.now
                self._kubelets[run.ref].on_power(run.cluster.pods[name], node)
                self._wake(run, self.now)
        if node.up:
            self._retry_waiting()


def _prepared_message() -> str:
    prepared = make_prepared()
    model = prepared.model.model_copy(update={"config": reduce_config(json.loads(MODEL.read_text()))})
    return make_termination_message(Reason.PREPARED, prepared=prepared.model_copy(update={"model": model}))


def _next_step(run: Run) -> timedelta:
    return min(CHECKPOINT_INTERVAL, run.work - run.saved)


def _waits(pod: Manifest) -> bool:
    return "nodeName" not in pod["spec"] and not is_deleting(pod)


def _describe(run: Run) -> str:
    """Return the Jobs and pods of a run as text that changes whenever they do."""
    children = run.cluster.children.items()
    jobs = [
        (job["metadata"], job["spec"].get("suspend"), job["status"]) for (kind, _), job in children if kind == "Job"
    ]
    pods = [(pod["metadata"], pod["spec"], pod["status"]) for pod in run.cluster.pods.values()]
    return repr((jobs, pods))


def submit_mixed_runs(fleet: Fleet, singles: int, gangs: int) -> None:
    """Submit runs of two GPUs, and gangs of four nodes with four GPUs each, one a minute."""
    runs = singles + gangs
    for number in range(runs):
        is_gang = number * gangs // runs != (number + 1) * gangs // runs
        work = timedelta(minutes=fleet.random.randint(60, 180))
        fleet.submit(f"run-{number:03}", timedelta(minutes=number), work, *((4, 4) if is_gang else (1, 2)))
