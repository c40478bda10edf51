"""Immutable values that parse, decide, build and status exchange; they know nothing of the API server."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Final

from qlora_api.job_ref import JobRef
from qlora_api.names import Phase, Role
from qlora_api.prepared import Prepared
from qlora_api.reasons import Reason
from qlora_api.report import TerminationMessage
from qlora_api.result import Result
from qlora_api.v1alpha1 import Attempt, Checkpoint, Plan, QLoRAJobSpec, QLoRAJobStatus

PREPARE_MEMORY: Final = "4Gi"
"""Memory limit of a prepare pod: it tokenizes in one process and holds one dataset in memory."""
PREPARE_DEADLINE: Final = timedelta(hours=1)
"""activeDeadlineSeconds of a prepare Job: it reads the dataset once and the model's small files."""

Manifest = dict[str, Any]
"""A Kubernetes object, as the API server accepts it."""


@dataclass(frozen=True)
class RawJob:
    """A QLoRAJob as the API server returned it; spec and status are not validated yet."""

    ref: JobRef
    uid: str
    generation: int
    resource_version: str
    created_at: datetime
    deleting: bool
    spec: Mapping[str, Any]
    status: Mapping[str, Any]


@dataclass(frozen=True)
class Job:
    """A QLoRAJob with validated spec and last status."""

    ref: JobRef
    uid: str
    generation: int
    created_at: datetime
    spec: QLoRAJobSpec
    status: QLoRAJobStatus


@dataclass(frozen=True)
class Waiting:
    """Why a container has not started (state.waiting)."""

    reason: str
    message: str = ""


@dataclass(frozen=True)
class Exit:
    """How a container ended (state.terminated)."""

    code: int
    reason: str = ""
    message: str = ""
    """The termination message: the trainer's, or the end of its log."""
    finished_at: datetime | None = None


@dataclass(frozen=True)
class Pod:
    """One pod of a child Job."""

    name: str
    uid: str
    phase: str = "Pending"
    node: str = ""
    created_at: datetime | None = None
    deleting: bool = False
    deletion_timestamp: datetime | None = None
    """When the grace period of a pod that is being deleted ends."""
    scheduled_at: datetime | None = None
    unschedulable: str = ""
    """The scheduler's message while no node fits; empty otherwise."""
    started_at: datetime | None = None
    waiting: Waiting | None = None
    exit: Exit | None = None
    disruption_message: str = ""
    """Message of the DisruptionTarget condition: preemption, eviction or drain."""
    disruption_reason: str = ""
    """Reason of that condition."""
    reason: str = ""
    """The kubelet's reason for rejecting or evicting the pod (status.reason)."""
    message: str = ""
    index: int = 0
    """Completion index in its Job."""


@dataclass(frozen=True)
class JobFailure:
    """The Failed condition of a batch/v1 Job."""

    reason: str
    message: str
    at: datetime | None = None


@dataclass(frozen=True)
class ChildJob:
    """A batch/v1 Job that belongs to the QLoRAJob, with its pods."""

    name: str
    role: Role
    attempt: int
    """0 for prepare."""
    created_at: datetime
    deadline_seconds: int | None = None
    deleting: bool = False
    suspended: bool = False
    """Its queue controller has not admitted it yet, or has evicted it."""
    complete: bool = False
    failure: JobFailure | None = None
    deadline_exceeded: bool = False
    """Its deadline has passed; Kubernetes is terminating its pods, or has done so."""
    completions: int = 1
    """Number of pods that it should have."""
    pods: tuple[Pod, ...] = ()
    """Its pods in order of their index; of two with the same index, the newer."""

    @property
    def pod(self) -> Pod | None:
        """Return the pod with index 0, whose state is reported unless another pod fails."""
        return next((pod for pod in self.pods if pod.index == 0), None)

    @property
    def finished(self) -> bool:
        """Return whether it is complete or failed, so that Kubernetes starts no more pods for it."""
        return self.complete or self.failure is not None

    def ended_at(self, now: datetime) -> datetime:
        """Return when the first of its pods ended, or now if that is unknown."""
        ends = [pod.exit.finished_at for pod in self.pods if pod.exit and pod.exit.finished_at]
        return min(ends, default=now)

    @property
    def holds_resources(self) -> bool:
        """Return whether its pods may still hold nodes or wait for some."""
        ended = [pod for pod in self.pods if pod.exit is not None]
        return not self.finished and len(ended) < self.completions


@dataclass(frozen=True)
class Observation:
    """Every child Job of a QLoRAJob with its pods, and the GPU nodes of the cluster."""

    jobs: tuple[ChildJob, ...] = ()
    gpu_nodes: tuple[Manifest, ...] = ()
    """Nodes with GPUs; listed only before a plan is made."""

    @property
    def prepare(self) -> ChildJob | None:
        """Return the prepare Job."""
        return next((job for job in self.jobs if job.role is Role.PREPARE), None)

    def train(self, attempt: int) -> ChildJob | None:
        """Return the Job of a training attempt."""
        return next((job for job in self.jobs if job.role is Role.TRAIN and job.attempt == attempt), None)


class Stage(StrEnum):
    """The stage of a child Job."""

    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"
    LOST = "lost"
    """Over, without any trace of how it ended."""


@dataclass(frozen=True)
class JobState:
    """A child Job, classified."""

    stage: Stage
    reason: Reason
    message: str = ""
    termination_message: TerminationMessage | None = None
    requeue_at: datetime | None = None
    """When the state changes without an event."""


@dataclass(frozen=True)
class AttemptInputs:
    """What the children of a training attempt are built from, besides the spec."""

    attempt: int
    plan: Plan
    prepared: Prepared
    seconds_left: int
    """What earlier attempts left of spec.deadlines.total."""
    avoided_nodes: tuple[str, ...] = ()
    """Nodes on which an attempt failed because of the node."""
    checkpoint: Checkpoint | None = None
    """The newest checkpoint that an earlier attempt reported."""


class Action(StrEnum):
    """What to do to the children."""

    NONE = "none"
    PREPARE = "prepare"
    TRAIN = "train"
    DELETE_RUNNING_JOBS = "stop"
    """Delete the Jobs that still run."""
    DELETE_PREPARE_JOB = "forget"
    """Delete the prepare Job, whose results are outdated."""
    DELETE_ALL_JOBS = "start over"
    """Delete all child Jobs; the next prepare finds what was published meanwhile."""


@dataclass(frozen=True)
class Decision:
    """The next phase of a run, why, and what to do to the children."""

    phase: Phase
    reason: Reason
    message: str
    action: Action = Action.NONE
    plan: Plan | None = None
    prepared: Prepared | None = None
    result: Result | None = None
    attempt: Attempt | None = None
    """The attempt as observed now; it replaces the one with the same number."""
    checkpoint: Checkpoint | None = None
    """The last checkpoint that an ended attempt reported."""
    requeue_at: datetime | None = None
    requeue_after: timedelta | None = None
