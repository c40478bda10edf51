"""From the pods of a child Job to one verdict: they live and die together, and the first speaks while all goes well."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta

from qlora_api.reasons import REASONS, Reason
from qlora_operator.lifecycle.exit_reasons import (
    NODE_GRACE_PERIOD,
    classify_abandoned,
    classify_exit,
    classify_missing_pod,
    classify_rejection,
    classify_unfinished,
    deadline_message,
    ended_state,
    format_seconds,
    is_abandoned,
    parse_termination_message,
)
from qlora_operator.models import ChildJob, JobState, Pod, Stage


def classify(child: ChildJob, startup: timedelta, now: datetime) -> JobState:
    """Say how far a child Job is, and why it ended if it did."""
    first = child.pod
    if first is not None and first.exit is not None and _succeeded(first):
        return classify_exit(child, first, first.exit)
    if child.suspended and not child.finished:
        return JobState(Stage.WAITING, Reason.QUEUED, f"Job {child.name} is suspended until its queue admits it")
    if failures := [pod for pod in child.pods if _failed(pod) or is_abandoned(pod, now)]:
        return _classify_failures(child, failures)
    if child.finished:
        return _classify_without_pods(child)
    if len(child.pods) < child.completions:
        return classify_missing_pod(child, startup, now)
    return _with_deletion_deadline(child, _classify_unfinished(child, startup, now))


def _classify_without_pods(child: ChildJob) -> JobState:
    """A Job is over, and no pod of it is left to say why."""
    if child.deadline_exceeded:
        return ended_state(Reason.DEADLINE_EXCEEDED, deadline_message(child))
    return JobState(
        Stage.LOST, Reason.POD_LOST, f"the pod of Job {child.name} disappeared, and its termination message with it"
    )


def is_busy(child: ChildJob, now: datetime) -> bool:
    """Return whether a pod of a Job may still hold a node."""
    return not child.finished and any(pod.exit is None and not is_abandoned(pod, now) for pod in child.pods)


def deletion_deadline(child: ChildJob) -> datetime | None:
    """Return when the last pod that is being deleted should have ended."""
    ends = [
        pod.deletion_timestamp + NODE_GRACE_PERIOD
        for pod in child.pods
        if pod.exit is None and pod.deletion_timestamp is not None
    ]
    return max(ends, default=None)


def _with_deletion_deadline(child: ChildJob, verdict: JobState) -> JobState:
    """Look again when a pod that is being deleted should have ended."""
    moments = [moment for moment in (deletion_deadline(child), verdict.requeue_at) if moment is not None]
    return replace(verdict, requeue_at=min(moments, default=None))


def _succeeded(pod: Pod) -> bool:
    """Return whether a pod ended as it should, or published before it was stopped."""
    if pod.exit is None:
        return False
    word = parse_termination_message(pod.exit.message)
    return pod.exit.code == 0 or (word is not None and word.reason is Reason.PUBLISHED)


def _failed(pod: Pod) -> bool:
    return pod.exit.code != 0 if pod.exit is not None else pod.phase == "Failed"


def _classify_failures(child: ChildJob, failures: Sequence[Pod]) -> JobState:
    """Take the best explanation; a consequence may come before its cause, so that it waits for the other pods' ends."""
    verdicts = [_classify_failure(child, pod) for pod in _by_end_time(failures)]
    verdict = min(verdicts, key=lambda verdict: REASONS[verdict.reason].consequence_rank)
    if child.completions == 1 or child.finished or REASONS[verdict.reason].consequence_rank == 0:
        return verdict
    message = f"pod {failures[0].name} ended, and the other pods of the run are being stopped: {verdict.message}"
    return JobState(Stage.RUNNING, Reason.TRAINING, message)


def _classify_failure(child: ChildJob, pod: Pod) -> JobState:
    if pod.exit is not None:
        return classify_exit(child, pod, pod.exit)
    return classify_rejection(pod) if pod.phase == "Failed" else classify_abandoned(pod)


def _by_end_time(pods: Sequence[Pod]) -> list[Pod]:
    """Return pods in the order in which they ended; one whose container never ran is first."""
    return sorted(pods, key=lambda pod: pod.exit.finished_at.timestamp() if pod.exit and pod.exit.finished_at else 0.0)


def _classify_unfinished(child: ChildJob, startup: timedelta, now: datetime) -> JobState:
    """Wait until all pods run; those that have a node hold it for the others, and not for ever."""
    verdicts = [classify_unfinished(pod, child.role, startup, now) for pod in child.pods if pod.exit is None]
    waiting = [verdict for verdict in verdicts if verdict.stage is not Stage.RUNNING]
    if not waiting:
        return verdicts[0]
    worst = next((verdict for verdict in waiting if verdict.stage is Stage.ENDED), waiting[0])
    placed = [pod.scheduled_at for pod in child.pods if pod.scheduled_at is not None]
    if worst.requeue_at is not None or worst.stage is Stage.ENDED or not placed:
        return worst
    deadline = min(placed) + startup
    if now < deadline:
        return JobState(worst.stage, worst.reason, worst.message, requeue_at=deadline)
    return ended_state(
        Reason.STARTUP_DEADLINE_EXCEEDED,
        f"only {len(placed)} of {child.completions} pods got a node within {format_seconds(startup)} "
        "(spec.deadlines.startup): "
        f"{worst.message}",
    )
