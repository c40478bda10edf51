"""Classifies how a container or pod ended into one of the reasons of `qlora_api.reasons`; the first match wins."""

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Final

from qlora_api.escapes import shell_command
from qlora_api.names import Role
from qlora_api.reasons import Domain, Reason
from qlora_api.report import UNEXPLAINED_EXIT
from qlora_operator.lifecycle.disruptions import ExitCause, cause_of_disruption, cause_of_rejection, describe_init
from qlora_operator.lifecycle.termination import POD_MESSAGE_BYTES, is_cut, parse_termination_message
from qlora_operator.models import PREPARE_DEADLINE, PREPARE_MEMORY, ChildJob, Exit, JobState, Pod, Stage

IMAGE_PULL_ERRORS: Final = frozenset({"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull"})
CONTAINER_START_ERRORS: Final = frozenset({"StartError", "ContainerCannotRun", "CreateContainerError"})
SIGTERM_EXIT: Final = 128 + 15
SIGKILL_EXIT: Final = 128 + 9
UNKNOWN_EXIT: Final = (255, "Unknown")
"""Exit of a container that containerd no longer finds, as after a reboot of the node (containerd, pkg/cri/server)."""
OOM_KILLED: Final = "OOMKilled"
_OOM_SYMPTOMS: Final = frozenset({Reason.TRAINER_ERROR, Reason.COLLECTIVE_TIMEOUT})
"""What the main process may report after the kernel killed another process of its container."""
NODE_GRACE_PERIOD: Final = timedelta(seconds=30)
"""A healthy kubelet terminates a pod within its grace period; this is time for it to report that."""
POD_CREATION_TIME: Final = timedelta(seconds=15)
"""The Job controller creates a pod within a second, and 20 a second (kube-controller-manager, --kube-api-qps)."""
LONGEST_EVENT_LOOKUP: Final = timedelta(minutes=5)
"""Longest time between two lookups of the Events of a Job without a pod."""
LOG_LINES: Final = 5
"""Last log lines that a status message quotes."""
MAX_LOG: Final = 1000
"""Characters of log that a status message quotes at most."""


def _cut_short(_: ChildJob, pod: Pod, end: Exit) -> ExitCause | None:
    """Name the limit that cut the details of a success out of its message; what was published is found again."""
    message = parse_termination_message(end.message)
    if message is None or message.prepared or message.result or not is_cut(end.message):
        return None
    limit = f"the kubelet keeps {POD_MESSAGE_BYTES} bytes for all containers of a pod"
    count = f", and this one has {pod.containers}" if pod.containers else ""
    what = f"the termination message of pod {pod.name} was cut after {len(end.message.encode())} bytes: {limit}{count}"
    if message.reason in {Reason.PREPARED, Reason.ALREADY_PUBLISHED}:
        return ExitCause(Reason.POD_REJECTED, f"{what}; let nothing add containers to the pods of runs")
    return ExitCause(Reason.POD_LOST, what) if message.reason is Reason.PUBLISHED else None


def _from_termination_message(child: ChildJob, pod: Pod, end: Exit) -> ExitCause | None:
    """Use the termination message whatever the exit code: a SIGTERM after publishing does not undo the result."""
    message = parse_termination_message(end.message)
    if message is None or (end.reason == OOM_KILLED and message.reason in _OOM_SYMPTOMS):
        return None
    # The trainer knows that it was interrupted, the cluster by whom.
    disruption = cause_of_disruption(child, pod) if message.reason is Reason.INTERRUPTED else None
    return disruption or ExitCause(message.reason, message.message)


def _out_of_memory(child: ChildJob, _: Pod, end: Exit) -> ExitCause | None:
    if end.reason != OOM_KILLED:
        return None
    symptom = parse_termination_message(end.message)
    seen = f"; one of its processes ended with {symptom.reason}: {symptom.message}" if symptom else ""
    what = f"the {_describe_role(child.role)} pod exceeded its memory limit ({_memory(child)}){seen}"
    return ExitCause(Reason.HOST_OUT_OF_MEMORY, what)


def _memory(child: ChildJob) -> str:
    if child.role is not Role.PREPARE:
        return "spec.resources.memory"
    if child.used_class:
        return f"{PREPARE_MEMORY}, or resources.prepare.memory of QLoRAClass {child.used_class}"
    return f"{PREPARE_MEMORY}; a QLoRAClass can set resources.prepare.memory"


def _describe_role(role: Role) -> str:
    return "prepare" if role is Role.PREPARE else "training"


def _disrupted(child: ChildJob, pod: Pod, _: Exit) -> ExitCause | None:
    return cause_of_disruption(child, pod)


def _interrupted(_: ChildJob, pod: Pod, end: Exit) -> ExitCause | None:
    if not (pod.deleting or end.code == SIGTERM_EXIT):
        return None
    cause = "deleted" if pod.deleting else "stopped by SIGTERM"
    return ExitCause(Reason.INTERRUPTED, f"pod {pod.name} was {cause} (exit code {end.code})")


def _killed(_: ChildJob, pod: Pod, end: Exit) -> ExitCause | None:
    if end.code != SIGKILL_EXIT:
        return None
    message = f"pod {pod.name} was killed by SIGKILL (exit code {end.code}); the kubelet reports no cause"
    return ExitCause(Reason.INTERRUPTED, message, Domain.NODE)


def _node_lost(_: ChildJob, pod: Pod, end: Exit) -> ExitCause | None:
    if end.reason != "ContainerStatusUnknown" and (end.code, end.reason) != UNKNOWN_EXIT:
        return None
    return ExitCause(Reason.NODE_LOST, pod.message or f"node {pod.node} lost the container of pod {pod.name}")


def _never_ran(_: ChildJob, __: Pod, end: Exit) -> ExitCause | None:
    return (
        ExitCause(Reason.POD_REJECTED, f"{end.reason}: {end.message}") if end.reason in CONTAINER_START_ERRORS else None
    )


def _unknown(_: ChildJob, pod: Pod, end: Exit) -> ExitCause:
    last_lines = "\n".join(end.message.strip().splitlines()[-LOG_LINES:])[-MAX_LOG:]
    command = shell_command("kubectl", "logs", pod.name)
    details = f"its last log lines: {last_lines}" if last_lines else f"see `{command}`"
    return ExitCause(
        Reason.TRAINER_ERROR, f"pod {pod.name} exited with code {end.code} and {UNEXPLAINED_EXIT}; {details}"
    )


_EXIT_CAUSES: Final[tuple[Callable[[ChildJob, Pod, Exit], ExitCause | None], ...]] = (
    _cut_short,
    _from_termination_message,
    _out_of_memory,
    _disrupted,
    _node_lost,
    _never_ran,
    _interrupted,
    _killed,
    _unknown,
)


def cause_of_exit(child: ChildJob, pod: Pod, end: Exit) -> ExitCause:
    """Return why a container ended."""
    return next(cause for find in _EXIT_CAUSES if (cause := find(child, pod, end)))


def ended_state(reason: Reason, message: str) -> JobState:
    """Return the state of a Job that has ended."""
    return JobState(Stage.ENDED, reason, message)


def _ended_on_node(pod: Pod, cause: ExitCause) -> JobState:
    stage = Stage.LOST if cause.reason is Reason.POD_LOST else Stage.ENDED
    return JobState(stage, cause.reason, cause.message, domain=cause.domain, node=pod.node)


def classify_exit(child: ChildJob, pod: Pod, end: Exit) -> JobState:
    """Classify a container that ended; one that was interrupted by the deadline of its Job exceeded that."""
    cause = cause_of_exit(child, pod, end)
    state = _ended_on_node(pod, cause)
    if child.deadline_exceeded and cause.reason is Reason.INTERRUPTED:
        state = ended_state(Reason.DEADLINE_EXCEEDED, deadline_message(child))
    return replace(state, termination_message=parse_termination_message(end.message))


def classify_rejection(child: ChildJob, pod: Pod) -> JobState:
    """Classify a pod that failed before its container ran."""
    if child.deadline_exceeded:
        return ended_state(Reason.DEADLINE_EXCEEDED, deadline_message(child))
    if cause := cause_of_disruption(child, pod):
        return _ended_on_node(pod, cause)
    if pod.deleting:
        message = f"pod {pod.name} was deleted before its container ran"
        return ended_state(Reason.INTERRUPTED, message)
    return _ended_on_node(pod, cause_of_rejection(pod))


def is_abandoned(pod: Pod, now: datetime) -> bool:
    """Return whether a pod is past its deletion deadline without an exit: its node is unreachable or dead."""
    end = deletion_end(pod)
    return pod.exit is None and end is not None and now >= end


def deletion_end(pod: Pod) -> datetime | None:
    """Return when a pod that is being deleted should have ended; None if it is not."""
    return pod.deletion_timestamp + NODE_GRACE_PERIOD if pod.deletion_timestamp is not None else None


def classify_abandoned(pod: Pod) -> JobState:
    """Classify a pod whose node does not respond."""
    message = f"node {pod.node} does not respond: pod {pod.name} is being deleted and does not terminate"
    return _ended_on_node(pod, ExitCause(Reason.NODE_LOST, message))


def deadline_message(child: ChildJob) -> str:
    """Return the message for a Job that exceeded its deadline."""
    if child.role is Role.PREPARE:
        limit = f"{PREPARE_DEADLINE.total_seconds():g} seconds"
        return f"Job {child.name} exceeded its deadline of {limit} (fixed for a prepare pod)"
    return f"Job {child.name} exceeded its deadline (what was left of spec.deadlines.total)"


def _stage_reason(role: Role) -> Reason:
    return Reason.PREPARING if role is Role.PREPARE else Reason.SCHEDULING


def describe_missing_pod(job: str) -> str:
    """Return the message for a Job whose pod does not exist yet."""
    return f"Job {job} has no pod yet"


def classify_missing_pod(child: ChildJob, now: datetime) -> JobState:
    """Wait for a pod: whatever keeps the Job controller from creating it, such as a quota, may change."""
    requeue_at = next_event_lookup(child, now)
    if child.event_message:
        message = f"Job {child.name} gets no pod: {child.event_message}"
        return JobState(Stage.WAITING, Reason.POD_REJECTED, message, requeue_at=requeue_at)
    message = describe_missing_pod(child.name)
    if waits_long_for_pod(child, now):
        message = f"{message}; `{shell_command('kubectl', 'describe', 'job', child.name)}` shows its Events"
    return JobState(Stage.WAITING, _stage_reason(child.role), message, requeue_at=requeue_at)


def waits_long_for_pod(child: ChildJob, now: datetime) -> bool:
    """Return whether a Job has waited longer for a pod than the Job controller takes to create one.

    A Job that has not started is none of these: among thousands, the Job controller has not come to it yet.
    """
    waits = len(child.pods) < child.completions and not (child.suspended or child.finished or child.failing)
    return waits and child.started_at is not None and now >= child.started_at + POD_CREATION_TIME


def failed_in_part(child: ChildJob) -> bool:
    """Return whether a gang failed while it lacked pods, which may never have been created."""
    return (
        child.started_at is not None
        and 0 < len(child.pods) < child.completions
        and (child.failing or child.failure is not None)
    )


def next_event_lookup(child: ChildJob, now: datetime) -> datetime | None:
    """Return when to look for the Events of a Job without a pod: ever later, as the Job controller's own back-off."""
    if child.started_at is None:
        return None
    return now + min(max(now - child.started_at, POD_CREATION_TIME), LONGEST_EVENT_LOOKUP)


def classify_unfinished(pod: Pod, role: Role, startup: timedelta, now: datetime) -> JobState:
    """Classify a pod whose container has not ended."""
    if pod.started_at is not None:
        return JobState(Stage.RUNNING, Reason.PREPARING if role is Role.PREPARE else Reason.TRAINING)
    if pod.scheduled_at is None:
        if pod.unschedulable:
            return JobState(Stage.WAITING, Reason.UNSCHEDULABLE, pod.unschedulable)
        gates = f"; its scheduling gates are {', '.join(pod.scheduling_gates)}" if pod.scheduling_gates else ""
        return JobState(Stage.WAITING, _stage_reason(role), f"pod {pod.name} is waiting for a node{gates}")
    return _classify_startup(pod, role, pod.scheduled_at + startup, startup, now)


def _classify_startup(pod: Pod, role: Role, deadline: datetime, startup: timedelta, now: datetime) -> JobState:
    """Wait for a container until the startup deadline; a pod that does not start holds its GPU for nothing."""
    is_image_error = pod.waiting is not None and pod.waiting.reason in IMAGE_PULL_ERRORS
    waiting = _describe_waiting(pod)
    if now < deadline:
        reason = Reason.IMAGE_PULL_FAILED if is_image_error else _stage_reason(role)
        return JobState(Stage.WAITING, reason, f"pod {pod.name} on node {pod.node}: {waiting}", requeue_at=deadline)
    reason = Reason.IMAGE_PULL_FAILED if is_image_error else Reason.STARTUP_DEADLINE_EXCEEDED
    limit = f"{format_seconds(startup)} (spec.deadlines.startup)"
    message = f"pod {pod.name} did not start on node {pod.node} within {limit}: {waiting}"
    # What others put before the trainer waits for a service of theirs, such as Vault.
    return _ended_on_node(pod, ExitCause(reason, message, Domain.SERVICE if _waits_for_init(pod) else None))


def _waits_for_init(pod: Pod) -> bool:
    """Return whether an init container has started and not ended; the image of one may be what is missing."""
    return pod.init is not None and pod.init.running


def _describe_waiting(pod: Pod) -> str:
    if pod.init is not None:
        return describe_init(pod.init)
    if pod.waiting is None:
        return "volumes or the pod sandbox are not ready"
    return ": ".join(filter(None, (pod.waiting.reason, pod.waiting.message)))


def format_seconds(duration: timedelta) -> str:
    """Format a duration in seconds."""
    return f"{duration.total_seconds():g} s"
