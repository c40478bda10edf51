"""Immutable values that parse, decide, build and status exchange; they know nothing of the API server."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Final

from qlora_api.job_ref import JobRef
from qlora_api.names import Phase, Role
from qlora_api.prepared import Prepared
from qlora_api.reasons import Domain, Reason
from qlora_api.report import TerminationMessage
from qlora_api.result import Result
from qlora_api.runconfig import Published
from qlora_api.v1alpha1 import (
    Attempt,
    Checkpoint,
    ClassStatus,
    Plan,
    Preparation,
    QLoRAJobSpec,
    QLoRAJobStatus,
    RetryLimits,
)

PREPARE_MEMORY: Final = "4Gi"
"""Memory limit of a prepare pod: it tokenizes in one process and holds one dataset in memory."""
PREPARE_DEADLINE: Final = timedelta(hours=1)
"""Longest time that the container of a prepare Job runs: it reads the dataset once and the model's small files."""


def earliest(now: datetime, *moments: datetime | None) -> datetime | None:
    """Return the earliest moment that is yet to come; a decision at a moment that has passed has been made already."""
    return min((moment for moment in moments if moment is not None and moment > now), default=None)


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
    retry_request: str | None = None
    """Value of the annotation qlora.dev/retry-requested-at, of bounded length; None without it."""


@dataclass(frozen=True)
class RawClass:
    """A QLoRAClass as the API server returned it; its spec is not validated yet."""

    name: str
    generation: int
    created_at: datetime
    is_default: bool
    spec: Mapping[str, Any]


@dataclass(frozen=True)
class Classes:
    """The QLoRAClasses of the cluster."""

    items: tuple[RawClass, ...] = ()
    unreadable: str = ""
    """Why they cannot be listed, and what to do; empty if they can."""


@dataclass(frozen=True)
class Retention:
    """What an installation deletes of runs that have ended, and how long after their end."""

    ttl: timedelta | None = None
    """Default of spec.ttl: deletes Jobs, pods, ConfigMaps and Services."""
    jobs: timedelta | None = None
    """Deletes the QLoRAJob itself; None keeps it."""


@dataclass(frozen=True)
class Skew:
    """What another version wrote into a QLoRAJob that this one would not, or cannot read."""

    invalid: str = ""
    """Why this version would refuse the spec at creation; empty if it would not."""
    unreadable: str = ""
    """Which fields that the next attempt depends on cannot be read, and what to do; empty if all can."""
    unknown_words: bool = False
    """Whether the spec has a word that the CRD of this version does not have, such as a strategy."""
    ignored: str = ""
    """Fields of the spec that this version does not know; empty if there are none."""
    recorded: bool = False
    """Whether the status has a plan or attempts, readable or not."""


@dataclass(frozen=True)
class Job:
    """A QLoRAJob with its spec and last status, as far as this version can read them."""

    ref: JobRef
    uid: str
    generation: int
    created_at: datetime
    spec: QLoRAJobSpec
    status: QLoRAJobStatus
    skew: Skew = Skew()


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
class InitContainer:
    """The first init container of a pod that has not succeeded."""

    name: str
    waiting: str = ""
    """Why it has not started, or why it is restarted; empty if it runs or has ended."""
    running: bool = False
    exit: Exit | None = None
    """How it failed."""


ENDED_POD_PHASES: Final = frozenset({"Succeeded", "Failed"})
"""Phases of a pod whose containers have all ended, so that the scheduler gives its GPUs to others."""


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
    deletion_requested_at: datetime | None = None
    """When its deletion was requested: that grace period earlier."""
    scheduled_at: datetime | None = None
    unschedulable: str = ""
    """The scheduler's message while no node fits; empty otherwise."""
    scheduling_gates: tuple[str, ...] = ()
    """What keeps the scheduler from looking for a node, such as Kueue's assignment of a topology."""
    started_at: datetime | None = None
    waiting: Waiting | None = None
    init: InitContainer | None = None
    """The init container that keeps its container from running; None if there is none."""
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
    containers: int = 0
    """How many it has, with those that others added; 0 if unknown."""
    released_at: datetime | None = None
    """When the last of its containers ended, and with it the pod; None while one runs, or if that is unknown."""

    @property
    def ended(self) -> bool:
        """Return whether its trainer has ended or will never run, whatever other containers do."""
        return self.exit is not None or self.phase in ENDED_POD_PHASES


@dataclass(frozen=True)
class JobFailure:
    """The Failed condition of a batch/v1 Job."""

    reason: str
    message: str
    at: datetime | None = None


@dataclass(frozen=True)
class Workload:
    """What Kueue says of a Job that waits in a queue; without a name, there is none."""

    name: str = ""
    kueue_served: bool = True
    """Whether the cluster has Kueue's API."""
    queue: str = ""
    active: bool = True
    """Whether Kueue may admit it (spec.active)."""
    admitted: bool = False
    quota_reserved: bool = False
    pending: str = ""
    """Why no quota is reserved: message of the condition QuotaReserved."""
    evicted: str = ""
    """Why it was taken out of the quota: message of the condition Evicted; empty if it was not, or since admitted."""
    checks: tuple[str, ...] = ()
    """Admission checks that are not ready, with their state and message."""
    requeue_at: datetime | None = None
    """Until when it is left out of the queue, after its pods did not get ready in time."""


@dataclass(frozen=True)
class ChildJob:
    """A batch/v1 Job that belongs to the QLoRAJob, with its pods."""

    name: str
    role: Role
    attempt: int
    """Number of the training attempt, or of the preparation."""
    created_at: datetime
    uid: str = ""
    started_at: datetime | None = None
    """When the Job controller started or resumed it; None before that."""
    deadline_seconds: int | None = None
    image: str | None = None
    """Image of its pods."""
    pull_secrets: tuple[str, ...] = ()
    """Names of the Secrets that they pull it with."""
    deleting: bool = False
    suspended: bool = False
    """Its queue controller has not admitted it yet, or has evicted it; or the Job controller has not resumed it yet."""
    suspended_at: datetime | None = None
    """When the Job controller suspended it, while it is suspended."""
    queue: str = ""
    """The Kueue queue in its label; empty if none."""
    priority_class: str = ""
    """The WorkloadPriorityClass in its label; empty if none."""
    watched: bool = True
    """Whether it has the label by which the operator watches Jobs."""
    workload: Workload | None = None
    """What its queue says; None unless looked up."""
    used_class: str = ""
    """The QLoRAClass in its label; empty if none."""
    managed_by: str = ""
    """The controller that runs it instead of Kubernetes' own (spec.managedBy); empty if none."""
    complete: bool = False
    completed_at: datetime | None = None
    failure: JobFailure | None = None
    failing: bool = False
    """Kubernetes is terminating its pods, after one of them failed or the deadline passed."""
    deadline_exceeded: bool = False
    """Its deadline has passed; Kubernetes is terminating its pods, or has done so."""
    completions: int = 1
    """Number of pods that it should have."""
    avoided_nodes: tuple[str, ...] = ()
    """Nodes on which its pods may not run."""
    node_terms: tuple[Manifest, ...] = ()
    """Alternatives of what its pods require of a node (nodeSelectorTerms), the avoided nodes among them."""
    pods: tuple[Pod, ...] = ()
    """Its pods in order of their index; of two with the same index, the newer."""
    earlier_pods: tuple[Pod, ...] = ()
    """Pods that are being deleted since it was suspended, although it has been resumed."""
    replaced_pods: tuple[Pod, ...] = ()
    """Pods whose index a newer pod has."""
    event_message: str = ""
    """Message of the newest Event that says why it has no pod, or why it was suspended; empty unless looked up."""

    @property
    def pod(self) -> Pod | None:
        """Return the pod with index 0, whose state is reported unless another pod fails."""
        return next((pod for pod in self.pods if pod.index == 0), None)

    @property
    def finished(self) -> bool:
        """Return whether it is complete or failed, so that Kubernetes starts no more pods for it."""
        return self.complete or self.failure is not None

    @property
    def finished_at(self) -> datetime | None:
        """Return when it completed or failed; None if it has not, or if that is unknown."""
        return self.failure.at if self.failure is not None else self.completed_at

    def ended_at(self, now: datetime) -> datetime:
        """Return when the first of its pods ended, or now if that is unknown."""
        ends = [pod.exit.finished_at for pod in self.pods if pod.exit and pod.exit.finished_at]
        return min(ends, default=now)

    @property
    def holds_resources(self) -> bool:
        """Return whether its trainers may still hold nodes or wait for some."""
        return not self.finished and sum(pod.ended for pod in self.pods) < self.completions


@dataclass(frozen=True)
class Observation:
    """Every child Job of a QLoRAJob with its pods, and the GPU nodes of the cluster."""

    jobs: tuple[ChildJob, ...] = ()
    gpu_nodes: tuple[Manifest, ...] | None = ()
    """Nodes with GPUs; listed only before a plan is made. None if the operator was not allowed to list them."""

    @property
    def prepare(self) -> ChildJob | None:
        """Return the newest prepare Job."""
        prepare = (job for job in self.jobs if job.role is Role.PREPARE)
        return max(prepare, key=lambda job: job.attempt, default=None)

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
    domain: Domain | None = None
    """Where the cause of its end lies; None: where the reason's record says."""
    node: str = ""
    """The node of the pod whose end decided; empty if unknown."""
    lacking_pods: int | None = None
    """Pods that its gang lacked, if that is why it ended."""


@dataclass(frozen=True)
class AttemptInputs:
    """What the children of a training attempt are built from, besides the spec."""

    attempt: int
    plan: Plan
    prepared: Prepared
    avoided_nodes: tuple[str, ...] = ()
    """Nodes on which its pods may not run, because attempts failed there."""
    disliked_nodes: tuple[str, ...] = ()
    """Nodes on which its pods run only if no other fits."""
    checkpoint: Checkpoint | None = None
    """The newest checkpoint that an earlier attempt reported."""
    published: Published = None
    """The manifests that earlier attempts reported; None: any is believed."""


class Action(StrEnum):
    """What to do to the children."""

    NONE = "none"
    PREPARE = "prepare"
    TRAIN = "train"
    DELETE_RUNNING_JOBS = "stop"
    """Delete the Jobs that still run."""


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
    preparation: Preparation | None = None
    """The current preparation, if it is to be recorded."""
    used_class: ClassStatus | None = None
    """The QLoRAClass that the run uses now."""
    attempt: Attempt | None = None
    """The attempt as observed now; it replaces the one with the same number."""
    checkpoint: Checkpoint | None = None
    """The last checkpoint that an ended attempt reported."""
    retry_limits: RetryLimits | None = None
    """The limits of the spec, if the run fails."""
    forgiven_attempts: int | None = None
    """Attempts up to this number no longer count against any retry budget."""
    requeue_at: datetime | None = None
    requeue_after: timedelta | None = None
