"""From the pods of a child Job to one verdict: they live and die together, and the first speaks while all goes well."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta

from qlora_api.reasons import REASONS, Reason
from qlora_operator.lifecycle.exit_reasons import (
    NODE_PATIENCE,
    deadline_message,
    ended,
    is_abandoned,
    judge_abandoned,
    judge_exit,
    judge_missing_pod,
    judge_refusal,
    judge_unfinished,
    read_last_word,
    seconds,
)
from qlora_operator.models import ChildJob, Pod, Stage, Verdict


def judge(child: ChildJob, startup: timedelta, now: datetime) -> Verdict:
    """Say how far a child Job is, and why it ended if it did."""
    first = child.pod
    if first is not None and first.exit is not None and _ended_well(first):
        return judge_exit(child, first, first.exit)
    if child.suspended and not child.finished:
        return Verdict(Stage.WAITING, Reason.QUEUED, f"Job {child.name} is suspended until its queue admits it")
    if failures := [pod for pod in child.pods if _failed(pod) or is_abandoned(pod, now)]:
        return _judge_failures(child, failures)
    if child.finished:
        return _judge_silent_end(child)
    if len(child.pods) < child.wanted:
        return judge_missing_pod(child, startup, now)
    return _with_patience(child, _judge_unfinished(child, startup, now))


def _judge_silent_end(child: ChildJob) -> Verdict:
    """A Job is over, and no pod of it is left to say why."""
    if child.overdue:
        return ended(Reason.DEADLINE_EXCEEDED, deadline_message(child))
    return Verdict(
        Stage.LOST, Reason.POD_LOST, f"the pod of Job {child.name} disappeared, and its termination message with it"
    )


def is_busy(child: ChildJob, now: datetime) -> bool:
    """Return whether a pod of a Job may still hold a node."""
    return not child.finished and any(pod.exit is None and not is_abandoned(pod, now) for pod in child.pods)


def patience_with(child: ChildJob) -> datetime | None:
    """Return when the last pod that is being deleted should have ended."""
    ends = [pod.gone_after + NODE_PATIENCE for pod in child.pods if pod.exit is None and pod.gone_after is not None]
    return max(ends, default=None)


def _with_patience(child: ChildJob, verdict: Verdict) -> Verdict:
    """Look again when a pod that is being deleted should have ended."""
    moments = [moment for moment in (patience_with(child), verdict.recheck_at) if moment is not None]
    return replace(verdict, recheck_at=min(moments, default=None))


def _ended_well(pod: Pod) -> bool:
    """Return whether a pod ended as it should, or published before it was stopped."""
    if pod.exit is None:
        return False
    word = read_last_word(pod.exit.message)
    return pod.exit.code == 0 or (word is not None and word.reason is Reason.PUBLISHED)


def _failed(pod: Pod) -> bool:
    return pod.exit.code != 0 if pod.exit is not None else pod.phase == "Failed"


def _judge_failures(child: ChildJob, failures: Sequence[Pod]) -> Verdict:
    """Take the best explanation; a consequence may come before its cause, so that it waits for the other pods' ends."""
    verdicts = [_judge_failure(child, pod) for pod in _by_time(failures)]
    verdict = min(verdicts, key=lambda verdict: REASONS[verdict.reason].consequence_rank)
    if child.wanted == 1 or child.finished or REASONS[verdict.reason].consequence_rank == 0:
        return verdict
    message = f"pod {failures[0].name} ended, and the other pods of the run are being stopped: {verdict.message}"
    return Verdict(Stage.RUNNING, Reason.TRAINING, message)


def _judge_failure(child: ChildJob, pod: Pod) -> Verdict:
    if pod.exit is not None:
        return judge_exit(child, pod, pod.exit)
    return judge_refusal(pod) if pod.phase == "Failed" else judge_abandoned(pod)


def _by_time(pods: Sequence[Pod]) -> list[Pod]:
    """Return pods in the order in which they ended; one whose container never ran is first."""
    return sorted(pods, key=lambda pod: pod.exit.finished_at.timestamp() if pod.exit and pod.exit.finished_at else 0.0)


def _judge_unfinished(child: ChildJob, startup: timedelta, now: datetime) -> Verdict:
    """Wait until all pods run; those that have a node hold it for the others, and not for ever."""
    verdicts = [judge_unfinished(pod, child.role, startup, now) for pod in child.pods if pod.exit is None]
    waiting = [verdict for verdict in verdicts if verdict.stage is not Stage.RUNNING]
    if not waiting:
        return verdicts[0]
    worst = next((verdict for verdict in waiting if verdict.stage is Stage.ENDED), waiting[0])
    placed = [pod.scheduled_at for pod in child.pods if pod.scheduled_at is not None]
    if worst.recheck_at is not None or worst.stage is Stage.ENDED or not placed:
        return worst
    deadline = min(placed) + startup
    if now < deadline:
        return Verdict(worst.stage, worst.reason, worst.message, recheck_at=deadline)
    return ended(
        Reason.STARTUP_DEADLINE_EXCEEDED,
        f"only {len(placed)} of {child.wanted} pods got a node within {seconds(startup)} (spec.deadlines.startup): "
        f"{worst.message}",
    )
