"""From what Kubernetes shows of a pod to a reason of our closed list; the first match wins."""

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Final, NamedTuple

from pydantic import ValidationError

from qlora_api.names import Reason, Role
from qlora_api.report import LastWord
from qlora_operator.models import PREPARE_MEMORY, ChildJob, Exit, Pod, Stage, Verdict

IMAGE_TROUBLE: Final = frozenset({"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull"})
NEVER_RAN: Final = frozenset({"StartError", "ContainerCannotRun", "CreateContainerError"})
SIGTERM_EXIT: Final = 128 + 15
SIGKILL_EXIT: Final = 128 + 9
EVICTED: Final = "Evicted"
"""status.reason of a pod that the kubelet stopped because its node ran short of something."""
DISRUPTION_REASONS: Final = {
    "PreemptionByScheduler": Reason.PREEMPTED,
    "DeletionByTaintManager": Reason.NODE_LOST,
    "DeletionByPodGC": Reason.NODE_LOST,
}
"""By the reason of the condition DisruptionTarget (Kubernetes' documentation of disruptions); a drain is the rest."""
NODE_PATIENCE: Final = timedelta(seconds=30)
"""A living kubelet ends a pod within its grace period; this is for its report."""
LOG_LINES: Final = 5
"""Last lines of a log that a status message quotes."""
MAX_LOG: Final = 1000
"""Characters of them."""


class Cause(NamedTuple):
    """Why a container ended."""

    reason: Reason
    message: str


def read_last_word(text: str) -> LastWord | None:
    """Read a termination message; it may be the end of a log, whose last line is the word."""
    for candidate in (text.strip(), text.strip().rpartition("\n")[2]):
        try:
            return LastWord.model_validate_json(candidate)
        except ValidationError:
            continue
    return None


def _said_by_trainer(_: ChildJob, pod: Pod, end: Exit) -> Cause | None:
    """A termination message holds whatever the exit code: a SIGTERM after the publication takes nothing back."""
    word = read_last_word(end.message)
    if word is None:
        return None
    # The trainer knows that it was asked to stop, and the cluster by whom.
    known = cause_of_disruption(pod) if word.reason is Reason.INTERRUPTED else None
    return known or Cause(word.reason, word.message)


def _out_of_memory(child: ChildJob, _: Pod, end: Exit) -> Cause | None:
    if end.reason != "OOMKilled":
        return None
    return Cause(
        Reason.HOST_OUT_OF_MEMORY, f"the {_describe_role(child.role)} pod exceeded its memory limit ({_memory(child)})"
    )


def _memory(child: ChildJob) -> str:
    return f"{PREPARE_MEMORY}, fixed for a prepare pod" if child.role is Role.PREPARE else "spec.resources.memory"


def _describe_role(role: Role) -> str:
    return "prepare" if role is Role.PREPARE else "training"


def cause_of_disruption(pod: Pod) -> Cause | None:
    """Say who took a pod away, where the cluster tells."""
    if pod.reason == EVICTED:
        return Cause(Reason.EVICTED, f"pod {pod.name} was evicted from node {pod.node}: {pod.message}")
    if not pod.disruption:
        return None
    reason = DISRUPTION_REASONS.get(pod.disruption, Reason.INTERRUPTED)
    return Cause(reason, f"pod {pod.name} on node {pod.node}: {pod.disrupted or pod.disruption}")


def _disrupted(_: ChildJob, pod: Pod, __: Exit) -> Cause | None:
    return cause_of_disruption(pod)


def _interrupted(_: ChildJob, pod: Pod, end: Exit) -> Cause | None:
    if not (pod.deleting or end.code == SIGTERM_EXIT):
        return None
    how = "deleted" if pod.deleting else "stopped by SIGTERM"
    return Cause(Reason.INTERRUPTED, f"pod {pod.name} was {how} (exit code {end.code})")


def _killed(_: ChildJob, pod: Pod, end: Exit) -> Cause | None:
    if end.code != SIGKILL_EXIT:
        return None
    return Cause(
        Reason.INTERRUPTED, f"pod {pod.name} was killed by SIGKILL (exit code {end.code}); the kubelet reports no cause"
    )


def _node_lost(_: ChildJob, pod: Pod, end: Exit) -> Cause | None:
    if end.reason != "ContainerStatusUnknown":
        return None
    return Cause(Reason.NODE_LOST, pod.message or f"node {pod.node} lost the container of pod {pod.name}")


def _never_ran(_: ChildJob, __: Pod, end: Exit) -> Cause | None:
    return Cause(Reason.POD_REJECTED, f"{end.reason}: {end.message}") if end.reason in NEVER_RAN else None


def _unknown(_: ChildJob, pod: Pod, end: Exit) -> Cause:
    last_lines = "\n".join(end.message.strip().splitlines()[-LOG_LINES:])[-MAX_LOG:]
    details = f"its last log lines: {last_lines}" if last_lines else f"see `kubectl logs {pod.name}`"
    return Cause(
        Reason.TRAINER_ERROR, f"pod {pod.name} exited with code {end.code} and wrote no termination message; {details}"
    )


_CAUSES: Final[tuple[Callable[[ChildJob, Pod, Exit], Cause | None], ...]] = (
    _said_by_trainer,
    _out_of_memory,
    _disrupted,
    _node_lost,
    _never_ran,
    _interrupted,
    _killed,
    _unknown,
)


def cause_of_exit(child: ChildJob, pod: Pod, end: Exit) -> Cause:
    """Say why a container ended."""
    return next(cause for find in _CAUSES if (cause := find(child, pod, end)))


def ended(reason: Reason, message: str) -> Verdict:
    """Return the verdict on what is over."""
    return Verdict(Stage.ENDED, reason, message)


def judge_exit(child: ChildJob, pod: Pod, end: Exit) -> Verdict:
    """Say why a container ended."""
    cause = cause_of_exit(child, pod, end)
    if child.overdue and cause.reason is Reason.INTERRUPTED:
        return ended(Reason.DEADLINE_EXCEEDED, deadline_message(child))
    return Verdict(Stage.ENDED, cause.reason, cause.message, read_last_word(end.message))


def judge_refusal(pod: Pod) -> Verdict:
    """The kubelet ended the pod before its container ran."""
    if cause := cause_of_disruption(pod):
        return ended(*cause)
    return ended(Reason.POD_REJECTED, pod.message or f"pod {pod.name} failed before its container ran")


def is_abandoned(pod: Pod, now: datetime) -> bool:
    """Return whether a pod should be gone, and its node does not say so: the node is cut off or dead."""
    return pod.exit is None and pod.gone_after is not None and now >= pod.gone_after + NODE_PATIENCE


def judge_abandoned(pod: Pod) -> Verdict:
    """The node of a pod does not answer."""
    return ended(
        Reason.NODE_LOST, f"node {pod.node} does not respond: pod {pod.name} is being deleted and does not terminate"
    )


def deadline_message(child: ChildJob) -> str:
    """Write the sentence for a Job that took too long."""
    limit = f" of {child.deadline_seconds} seconds" if child.deadline_seconds else ""
    fixed = child.role is Role.PREPARE
    source = "fixed for a prepare pod" if fixed else "what was left of spec.deadlines.total"
    return f"Job {child.name} exceeded its deadline{limit} ({source})"


def _stage_reason(role: Role) -> Reason:
    return Reason.PREPARING if role is Role.PREPARE else Reason.SCHEDULING


def describe_missing_pod(job: str) -> str:
    """Write the sentence for a Job between its creation and its pod's."""
    return f"Job {job} has no pod yet"


def judge_missing_pod(child: ChildJob, startup: timedelta, now: datetime) -> Verdict:
    """The Job controller needs a moment; a quota or a policy refuses for ever."""
    deadline = child.created_at + startup
    if now < deadline:
        message = describe_missing_pod(child.name)
        return Verdict(Stage.WAITING, _stage_reason(child.role), message, recheck_at=deadline)
    return ended(
        Reason.POD_REJECTED,
        f"Job {child.name} got no pod within {seconds(startup)} (spec.deadlines.startup): a quota or an admission "
        f"policy rejects it; `kubectl describe job {child.name}` shows its message",
    )


def judge_unfinished(pod: Pod, role: Role, startup: timedelta, now: datetime) -> Verdict:
    """Say how far a pod is whose container has not ended."""
    if pod.started_at is not None:
        return Verdict(Stage.RUNNING, Reason.PREPARING if role is Role.PREPARE else Reason.TRAINING)
    if pod.scheduled_at is None:
        if pod.unschedulable:
            return Verdict(Stage.WAITING, Reason.UNSCHEDULABLE, pod.unschedulable)
        return Verdict(Stage.WAITING, _stage_reason(role), f"pod {pod.name} is waiting for a node")
    return _judge_startup(pod, role, pod.scheduled_at + startup, startup, now)


def _judge_startup(pod: Pod, role: Role, deadline: datetime, startup: timedelta, now: datetime) -> Verdict:
    """A pod on a node that does not start holds its GPU."""
    image = pod.waiting is not None and pod.waiting.reason in IMAGE_TROUBLE
    trouble = _describe_waiting(pod)
    if now < deadline:
        reason = Reason.IMAGE_PULL_FAILED if image else _stage_reason(role)
        return Verdict(Stage.WAITING, reason, f"pod {pod.name} on node {pod.node}: {trouble}", recheck_at=deadline)
    return ended(
        Reason.IMAGE_PULL_FAILED if image else Reason.STARTUP_DEADLINE_EXCEEDED,
        f"pod {pod.name} did not start on node {pod.node} within {seconds(startup)} (spec.deadlines.startup): "
        f"{trouble}",
    )


def _describe_waiting(pod: Pod) -> str:
    if pod.waiting is None:
        return "volumes or the sandbox are not ready"
    return ": ".join(filter(None, (pod.waiting.reason, pod.waiting.message)))


def seconds(duration: timedelta) -> str:
    """Write a duration in seconds."""
    return f"{duration.total_seconds():g} s"
