"""The Job controller of one run, and what the kubelets of a fleet do with its pods."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from random import Random
from typing import Final

from qlora_api import names
from qlora_api.job_ref import JobRef
from qlora_api.names import TERMINAL, Role
from qlora_api.reasons import Reason
from qlora_operator.models import Manifest
from tests.fake_kubernetes import GRACE, FakeKubernetes, is_deleting, is_running, name_of
from tests.fake_kubernetes import has_ended as has_pod_ended
from tests.fakes import FakeCluster, wire_time
from tests.fleet.nodes import (
    ADMISSION_MESSAGE,
    CRASH_ENDS,
    EVICTION_DELAY,
    GPU_ENDS,
    START_MESSAGE,
    STUCK_REASONS,
    Fault,
    Node,
    choose_node,
)
from tests.make import make_termination_message

PULL_TIME: Final = timedelta(seconds=30)
"""From a node to a running container."""
PREPARE_TIME: Final = timedelta(minutes=2)
BAD_SECONDS: Final = (60.0, 900.0)
"""How long a training runs at least and at most before a broken node ends it."""


@dataclass
class Holding:
    """GPUs that a pod holds."""

    node: Node
    gpus: int
    since: datetime


@dataclass(eq=False)
class Run:
    """One QLoRAJob, and what its pods have done so far."""

    ref: JobRef
    nodes: int
    gpus: int
    """Per node."""
    work: timedelta
    """Training that it needs."""
    prepared: str
    """Termination message of its preparation."""
    cluster: FakeCluster = field(default_factory=FakeCluster)
    saved: timedelta = timedelta(0)
    """Training that is in its newest checkpoint."""
    saved_at: datetime | None = None
    """When that was written, or training began; None while nothing trains."""
    saved_by: Counter[str] = field(default_factory=Counter)
    """Seconds of training that each Job has saved."""
    due: datetime | None = None
    """When the operator wants to reconcile it again."""
    seen: str = ""
    """Jobs and pods as the operator saw them last."""
    holdings: dict[str, Holding] = field(default_factory=dict)
    """By the name of the pod."""
    ends: dict[str, tuple[datetime, int, str]] = field(default_factory=dict)
    """When and how containers will end, by the name of the pod."""
    faults: dict[str, Fault] = field(default_factory=dict)
    """The fault that ended a Job, by its name."""

    @property
    def phase(self) -> str:
        """Return its phase."""
        return str(self.cluster.status.get("phase", "")) if self.cluster.job else ""

    @property
    def finished(self) -> bool:
        """Return whether it has ended and holds nothing."""
        return self.phase in TERMINAL and not self.holdings

    def job_of(self, pod: Manifest) -> str:
        """Return the Job of a pod."""
        return str(pod["metadata"]["ownerReferences"][0]["name"])

    def is_training(self, pod: Manifest) -> bool:
        """Return whether a pod is not that of a preparation."""
        job = self.cluster.children["Job", self.job_of(pod)]
        return bool(job["metadata"]["labels"][names.ROLE_LABEL] == Role.TRAIN)

    def training_pods(self) -> list[Manifest]:
        """Return the pods that train."""
        return [
            pod
            for name, pod in self.cluster.pods.items()
            if self.is_training(pod) and is_running(pod) and not is_deleting(pod) and not self.holdings[name].node.dead
        ]


class Kubelets(FakeKubernetes):
    """The Job controller of one run, and the kubelets of the nodes that its pods are on."""

    def __init__(self, run: Run, nodes: list[Node], random: Random, wake: Callable[[Run, datetime], None]) -> None:
        super().__init__(run.cluster)
        self._run_of, self._nodes, self._random, self._wake = run, nodes, random, wake

    def _schedule(self, pod: Manifest) -> None:
        if "nodeName" in pod["spec"] or is_deleting(pod):
            return
        run, gpus = self._run_of, self._run_of.gpus if self._run_of.is_training(pod) else 0
        template = self._job(run.job_of(pod))["spec"]["template"]["spec"]
        node = choose_node(self._nodes, gpus, template, self._random)
        if node is None:
            why = {"type": "PodScheduled", "status": "False", "message": "0/40 nodes are available: Insufficient gpu."}
            pod["status"] = {"phase": "Pending", "conditions": [why]}
            return
        node.free -= gpus
        run.holdings[name_of(pod)] = Holding(node, gpus, self.cluster.now)
        pod["spec"]["nodeName"] = node.name
        bound = {"type": "PodScheduled", "status": "True", "lastTransitionTime": wire_time(self.cluster.now)}
        pod["status"] = {"phase": "Pending", "conditions": [bound]}
        self._wake(run, self.cluster.now + PULL_TIME)

    def _run(self, pod: Manifest) -> None:
        holding = self._run_of.holdings.get(name_of(pod))
        if holding is None or has_pod_ended(pod):
            return
        if holding.node.dead:
            self._evict(pod, holding.node)
        elif is_deleting(pod):
            asked = datetime.fromisoformat(pod["metadata"]["deletionTimestamp"]) - GRACE
            if self.cluster.now - asked >= self.stop_time:
                self._stop(pod)
            else:
                self._wake(self._run_of, asked + self.stop_time)
        elif is_running(pod):
            self.end_if_due(pod)
        else:
            self._start(pod, holding)

    def _start(self, pod: Manifest, holding: Holding) -> None:
        training, node, now = self._run_of.is_training(pod), holding.node, self.cluster.now
        if node.fault is Fault.ADMISSION and training:
            self._blame(pod, node)
            pod["status"] |= {
                "phase": "Failed", "reason": "UnexpectedAdmissionError", "message": ADMISSION_MESSAGE,
            }  # fmt: skip
        elif node.fault is Fault.START and training:
            self._blame(pod, node)
            ended = {"exitCode": 128, "reason": "StartError", "message": START_MESSAGE, "finishedAt": wire_time(now)}
            self._set_state(pod, "Failed", {"terminated": ended})
        elif node.fault is Fault.STUCK:
            self._blame(pod, node)
            self._set_state(pod, "Pending", {"waiting": {"reason": STUCK_REASONS[node.variant]}})
        elif now - holding.since >= PULL_TIME:
            self._set_state(pod, "Running", {"running": {"startedAt": wire_time(now)}})
            self._plan_end(pod, node)

    def _plan_end(self, pod: Manifest, node: Node) -> None:
        """Decide when and how the container that starts now ends, if its node or the end of a preparation ends it."""
        training, soon = self._run_of.is_training(pod), timedelta(seconds=self._random.uniform(*BAD_SECONDS))
        end = (timedelta(0), 0, "")
        if node.fault is Fault.GPU and training:
            end = (soon, *GPU_ENDS[node.variant])
        elif node.fault is Fault.CRASH:
            end = (soon if training else PREPARE_TIME / 2, *CRASH_ENDS[node.variant])
        elif not training:
            end = (PREPARE_TIME, 0, self._run_of.prepared)
        else:
            return
        self.plan_end(pod, *end)

    def plan_end(self, pod: Manifest, after: timedelta, code: int, message: str) -> None:
        """End a running container some time from now."""
        at = self.cluster.now + after
        self._run_of.ends[name_of(pod)] = (at, code, message)
        self._wake(self._run_of, at)

    def end_if_due(self, pod: Manifest) -> None:
        """End a container whose time has come."""
        end = self._run_of.ends.get(name_of(pod))
        if end is None or self.cluster.now < end[0]:
            return
        del self._run_of.ends[name_of(pod)]
        if end[1]:
            self._blame(pod, self._run_of.holdings[name_of(pod)].node)
        self._end(pod, end[1], end[2])

    def on_power(self, pod: Manifest, node: Node) -> None:
        """Let a pod notice that its node has gone down, or come back."""
        if not node.up:
            self._blame(pod, node)
        if has_pod_ended(pod):
            return
        if not node.up and node.variant == 0 and is_running(pod):
            self._disrupt(pod, "TerminationByKubelet")
            pod["status"] |= {
                "reason": "Terminated",
                "message": "Pod was terminated in response to imminent node shutdown.",
            }
            self._end(pod, 143, make_termination_message(Reason.INTERRUPTED, "asked to stop"))
        elif node.up and node.variant == 1:
            ended = {"exitCode": 137, "reason": "ContainerStatusUnknown", "finishedAt": wire_time(self.cluster.now)}
            self._set_state(pod, "Failed", {"terminated": ended})

    def _evict(self, pod: Manifest, node: Node) -> None:
        """Delete a pod once its node has been silent for long enough; it does not end."""
        at = (node.changed_at or self.cluster.now) + EVICTION_DELAY
        if self.cluster.now < at:
            self._wake(self._run_of, at)
        elif not is_deleting(pod):
            self._disrupt(pod, "DeletionByTaintManager")
            self._delete([pod])

    @staticmethod
    def _disrupt(pod: Manifest, reason: str) -> None:
        pod["status"]["conditions"].append({"type": "DisruptionTarget", "status": "True", "reason": reason})

    def _blame(self, pod: Manifest, node: Node) -> None:
        if node.fault is not None and self._run_of.is_training(pod):
            self._run_of.faults.setdefault(self._run_of.job_of(pod), node.fault)
