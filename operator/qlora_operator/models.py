"""Frozen values between the stages; nothing here knows how they were fetched or where they go."""

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
"""Memory limit of a prepare pod: it tokenises in one process and holds one dataset in memory."""
PREPARE_DEADLINE: Final = timedelta(hours=1)
"""Longest time that a prepare Job may take: it reads the dataset once and the model's small files."""

Manifest = dict[str, Any]
"""A whole Kubernetes object, as the API server takes it."""


@dataclass(frozen=True)
class RawJob:
    """A QLoRAJob as the API server returned it; spec and status are still unread."""

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
    """A QLoRAJob whose spec and last status were understood."""

    ref: JobRef
    uid: str
    generation: int
    created_at: datetime
    spec: QLoRAJobSpec
    status: QLoRAJobStatus


@dataclass(frozen=True)
class Waiting:
    """Why a container has not started."""

    reason: str
    message: str = ""


@dataclass(frozen=True)
class Exit:
    """How a container ended."""

    code: int
    reason: str = ""
    message: str = ""
    """The termination message: the trainer's last word, or the end of its log."""
    finished_at: datetime | None = None


@dataclass(frozen=True)
class Pod:
    """What one pod of a child Job tells."""

    name: str
    uid: str
    phase: str = "Pending"
    node: str = ""
    created_at: datetime | None = None
    deleting: bool = False
    deletion_timestamp: datetime | None = None
    """When a pod that is being deleted has used up its grace period."""
    scheduled_at: datetime | None = None
    unschedulable: str = ""
    """The scheduler's sentence, while no node fits."""
    started_at: datetime | None = None
    waiting: Waiting | None = None
    exit: Exit | None = None
    disruption_message: str = ""
    """Message of the DisruptionTarget condition: preemption, eviction, drain."""
    disruption_reason: str = ""
    """Reason of that condition."""
    reason: str = ""
    """The kubelet's reason for refusing or evicting the whole pod."""
    message: str = ""
    index: int = 0
    """Its number among the pods of its Job."""


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
    """Whoever admits it (a queue) has not done so, or has taken it back."""
    complete: bool = False
    failure: JobFailure | None = None
    deadline_exceeded: bool = False
    """Its deadline has passed; Kubernetes is ending its pod, or has ended it."""
    completions: int = 1
    """Pods that it is to have."""
    pods: tuple[Pod, ...] = ()
    """Those that it has, by their index; of two with one index the newer."""

    @property
    def pod(self) -> Pod | None:
        """The first pod, which speaks for the run while all goes well."""
        return next((pod for pod in self.pods if pod.index == 0), None)

    @property
    def finished(self) -> bool:
        """Whether Kubernetes will start nothing more for it."""
        return self.complete or self.failure is not None

    def ended_at(self, now: datetime) -> datetime:
        """Return when its first pod ended; now, where nobody knows."""
        ends = [pod.exit.finished_at for pod in self.pods if pod.exit and pod.exit.finished_at]
        return min(ends, default=now)

    @property
    def holds_resources(self) -> bool:
        """Whether a node or the scheduler is still busy with it."""
        ended = [pod for pod in self.pods if pod.exit is not None]
        return not self.finished and len(ended) < self.completions


@dataclass(frozen=True)
class Observation:
    """Every child of one QLoRAJob, and what a plan for it needs to know."""

    jobs: tuple[ChildJob, ...] = ()
    gpu_nodes: tuple[Manifest, ...] = ()
    """Nodes with GPUs; looked at only where a run is about to be planned."""

    @property
    def prepare(self) -> ChildJob | None:
        """The Job that prepares."""
        return next((job for job in self.jobs if job.role is Role.PREPARE), None)

    def train(self, attempt: int) -> ChildJob | None:
        """The Job of a training attempt."""
        return next((job for job in self.jobs if job.role is Role.TRAIN and job.attempt == attempt), None)


class Stage(StrEnum):
    """How far a child Job is."""

    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"
    LOST = "lost"
    """Over, and nobody can say how."""


@dataclass(frozen=True)
class JobState:
    """What a child Job's state means."""

    stage: Stage
    reason: Reason
    message: str = ""
    termination_message: TerminationMessage | None = None
    requeue_at: datetime | None = None
    """When time alone changes the verdict."""


@dataclass(frozen=True)
class AttemptInputs:
    """What a training attempt is decided by, beside the spec."""

    attempt: int
    plan: Plan
    prepared: Prepared
    seconds_left: int
    """What earlier attempts have left of spec.deadlines.total."""
    avoided_nodes: tuple[str, ...] = ()
    """Nodes that cannot do what they promise."""


class Action(StrEnum):
    """What has to be done to the children."""

    NONE = "none"
    PREPARE = "prepare"
    TRAIN = "train"
    DELETE_RUNNING_JOBS = "stop"
    """Delete the Jobs that still run."""
    DELETE_PREPARE_JOB = "forget"
    """Delete the prepare Job: what it found is no longer so."""
    DELETE_ALL_JOBS = "start over"
    """Delete all child Jobs; what was published meanwhile is found by the next prepare."""


@dataclass(frozen=True)
class Decision:
    """Where the run stands, and what comes next."""

    phase: Phase
    reason: Reason
    message: str
    action: Action = Action.NONE
    plan: Plan | None = None
    prepared: Prepared | None = None
    result: Result | None = None
    attempt: Attempt | None = None
    """The attempt as it is now known; it replaces the one with its number."""
    checkpoint: Checkpoint | None = None
    """What an ended attempt told of last."""
    requeue_at: datetime | None = None
    requeue_after: timedelta | None = None
