"""Classifies the pods of a child Job as one gang: if one fails, all stop, and the cause decides the reason."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Final

from qlora_api.names import Role, output_root
from qlora_api.reasons import REASONS, Domain, Reason
from qlora_api.report import TerminationMessage
from qlora_api.result import is_below
from qlora_api.v1alpha1.types import MAX_URI
from qlora_operator.lifecycle.context import startup_timeout
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
)
from qlora_operator.lifecycle.queue import next_queue_lookup
from qlora_operator.lifecycle.termination import parse_termination_message
from qlora_operator.models import ChildJob, Job, JobState, Pod, Stage, earliest

PEER_PATIENCE: Final = timedelta(minutes=5)
"""Longest wait for the other pods of a run after one failed: the Job controller stops them within their grace period,
or they lose their connections to it."""


def classify(child: ChildJob, startup: timedelta, now: datetime) -> JobState:
    """Return the state of a child Job, and why it ended if it did."""
    first = child.pod
    if first is not None and first.exit is not None and _succeeded(first):
        return classify_exit(child, first, first.exit)
    if child.suspended and not child.finished:
        message = f"Job {child.name} is suspended until its queue admits it"
        return JobState(Stage.WAITING, Reason.QUEUED, message, requeue_at=next_queue_lookup(child, now))
    if failures := [pod for pod in child.pods if _failed(pod) or is_abandoned(pod, now)]:
        return _with_deletion_deadline(child, _classify_failures(child, failures, now), now)
    if child.finished:
        return _classify_without_pods(child)
    # Kubernetes creates no pod while one of an earlier start has not ended (podReplacementPolicy: Failed).
    if abandoned := [pod for pod in child.earlier_pods if is_abandoned(pod, now)]:
        return classify_abandoned(abandoned[0])
    return _with_deletion_deadline(child, _classify_unfinished(child, startup, now), now)


def classify_child(job: Job, child: ChildJob, now: datetime) -> JobState:
    """Return the state of a child Job of a QLoRAJob; a termination message with facts of another run does not count."""
    if child.managed_by and not child.finished:
        return ended_state(Reason.INVALID_SPEC, _describe_dispatched(child))
    state = _with_known_uris(job, classify(child, startup_timeout(job), now))
    foreign = _find_foreign_fact(job, state.termination_message) if state.termination_message else None
    if foreign is None:
        return state
    message = (
        f"the termination message of Job {child.name} is not of this run: its {foreign}; find out who can write to the "
        "output, or run code in the pod"
    )
    return replace(ended_state(Reason.TRAINER_ERROR, message), domain=Domain.AUTHOR)


def _describe_dispatched(child: ChildJob) -> str:
    return (
        f"spec.queue: Job {child.name} was handed over to {child.managed_by} (spec.managedBy), which runs it in "
        "another cluster, without its configuration; name a queue of this cluster, then retry the run"
    )


def _with_known_uris(job: Job, state: JobState) -> JobState:
    """Put the URIs back that a prepare pod left out of a termination message that would have been too long."""
    message = state.termination_message
    if message is None or message.prepared is None:
        return state
    root = output_root(job.spec.output.uri, job.ref.name)
    prepared = message.prepared.with_known_uris(root, job.spec.model.uri)
    return replace(state, termination_message=message.model_copy(update={"prepared": prepared}))


def _find_foreign_fact(job: Job, message: TerminationMessage) -> str | None:
    """Return what a message says that cannot be of this run; whoever takes over a pod can write any message."""
    prepared, digest = message.prepared, job.status.output.digest if job.status.output else ""
    root = output_root(job.spec.output.uri, job.ref.name)
    prefix = f"{root}/{prepared.digest if prepared else digest}".rstrip("/")
    if prepared is not None and (prepared.prefix, prepared.model.uri) != (prefix, job.spec.model.uri):
        return f"prefix is {prepared.prefix[:MAX_URI]!r} for model {prepared.model.uri!r}"
    for result in (message.result, prepared.published if prepared else None):
        if result is not None and (foreign := result.find_foreign_uri(prefix)):
            return f"{foreign} is not below {prefix}"
    checkpoint = message.checkpoint
    if checkpoint is not None and not is_below(checkpoint.uri, prefix):
        return f"checkpoint {checkpoint.uri[:MAX_URI]!r} is not below {prefix}"
    return None


def _classify_without_pods(child: ChildJob) -> JobState:
    """Classify a finished Job whose pods are gone."""
    if child.deadline_exceeded:
        return ended_state(Reason.DEADLINE_EXCEEDED, deadline_message(child))
    return JobState(
        Stage.LOST, Reason.POD_LOST, f"the pod of Job {child.name} disappeared, and its termination message with it"
    )


def is_busy(child: ChildJob, now: datetime) -> bool:
    """Return whether the trainer in a pod of a Job may still run."""
    return not child.finished and any(_is_busy(pod, now) for pod in (*child.pods, *child.earlier_pods))


def _is_busy(pod: Pod, now: datetime) -> bool:
    return not (pod.ended or is_abandoned(pod, now))


def deletion_deadline(child: ChildJob, now: datetime) -> datetime | None:
    """Return when the next pod that is being deleted should have ended."""
    pods = (*child.pods, *child.earlier_pods)
    ends = (pod.deletion_timestamp + NODE_GRACE_PERIOD for pod in pods if pod.deletion_timestamp and not pod.ended)
    return earliest(now, *ends)


def _with_deletion_deadline(child: ChildJob, state: JobState, now: datetime) -> JobState:
    """Requeue when a pod that is being deleted should have ended, unless the Job has."""
    if state.stage is Stage.ENDED:
        return state
    return replace(state, requeue_at=earliest(now, deletion_deadline(child, now), state.requeue_at))


def _succeeded(pod: Pod) -> bool:
    """Return whether a pod exited with 0, or published before it was stopped."""
    if pod.exit is None:
        return False
    message = parse_termination_message(pod.exit.message)
    return pod.exit.code == 0 or (message is not None and message.reason is Reason.PUBLISHED)


def _failed(pod: Pod) -> bool:
    return pod.exit.code != 0 if pod.exit is not None else pod.phase == "Failed"


def _classify_failures(child: ChildJob, failures: Sequence[Pod], now: datetime) -> JobState:
    """Return the failure that is most likely the cause; as a consequence may show first, wait a while for all pods."""
    states = [_classify_failure(child, pod) for pod in _by_end_time(failures)]
    state = min(states, key=lambda state: REASONS[state.reason].consequence_rank)
    if REASONS[state.reason].consequence_rank and len(child.pods) < child.completions and child.event_message:
        return replace(_classify_refused_pods(child), termination_message=state.termination_message)
    patience_ends = child.ended_at(now) + PEER_PATIENCE
    if REASONS[state.reason].consequence_rank == 0 or not is_busy(child, now) or now >= patience_ends:
        return state
    message = f"pod {failures[0].name} ended, and the other pods of the run are being stopped: {state.message}"
    return JobState(Stage.RUNNING, Reason.TRAINING, message, requeue_at=patience_ends)


def _classify_refused_pods(child: ChildJob) -> JobState:
    """Classify a gang of which the API server refused some pods: the nodes of the others are not to blame."""
    missing = child.completions - len(child.pods)
    message = f"{missing} of {child.completions} pods of Job {child.name} were not created: {child.event_message}"
    return _end_lacking(Reason.POD_REJECTED, message, missing)


def _end_lacking(reason: Reason, message: str, pods: int) -> JobState:
    return replace(ended_state(reason, message), domain=Domain.CLUSTER, lacking_pods=pods)


def _classify_failure(child: ChildJob, pod: Pod) -> JobState:
    if pod.exit is not None:
        return classify_exit(child, pod, pod.exit)
    return classify_rejection(child, pod) if pod.phase == "Failed" else classify_abandoned(pod)


def _by_end_time(pods: Sequence[Pod]) -> list[Pod]:
    """Sort pods by when they ended; those whose container never ran come first."""
    return sorted(pods, key=lambda pod: pod.exit.finished_at.timestamp() if pod.exit and pod.exit.finished_at else 0.0)


def _classify_unfinished(child: ChildJob, startup: timedelta, now: datetime) -> JobState:
    """Wait until all pods run; those that have a node hold it for the others until the startup deadline."""
    missing = child.completions - len(child.pods)
    if missing and child.failing:
        reason = Reason.PREPARING if child.role is Role.PREPARE else Reason.TRAINING
        return JobState(Stage.RUNNING, reason, f"the pods of Job {child.name} are being stopped")
    states = [classify_missing_pod(child, now)] if missing else []
    states += [classify_unfinished(pod, child.role, startup, now) for pod in child.pods if pod.exit is None]
    waiting = [state for state in states if state.stage is not Stage.RUNNING]
    if not waiting:
        return states[0]
    worst = next((state for state in waiting if state.stage is Stage.ENDED), waiting[0])
    requeue_at = earliest(now, *(state.requeue_at for state in waiting))
    scheduled = [pod.scheduled_at for pod in child.pods if pod.scheduled_at is not None]
    if worst.stage is Stage.ENDED or not scheduled or len(scheduled) == child.completions:
        return replace(worst, requeue_at=requeue_at)
    deadline = min(scheduled) + startup
    if now < deadline:
        return replace(worst, requeue_at=earliest(now, requeue_at, deadline))
    return _end_incomplete_gang(child, startup, worst.message)


def _end_incomplete_gang(child: ChildJob, startup: timedelta, waits_for: str) -> JobState:
    """End a gang of which some pods hold nodes that the others did not get in time; no node is to blame."""
    missing = child.completions - len(child.pods)
    if missing and child.event_message:
        return _classify_refused_pods(child)
    if missing and any(pod.started_at for pod in child.pods):
        message = f"{missing} of {child.completions} pods of Job {child.name} disappeared, or were never created"
        return ended_state(Reason.INTERRUPTED, message)
    placed = sum(pod.scheduled_at is not None for pod in child.pods)
    message = (
        f"only {placed} of {child.completions} pods got a node within {format_seconds(startup)} "
        f"(spec.deadlines.startup): {waits_for}"
    )
    return _end_lacking(Reason.STARTUP_DEADLINE_EXCEEDED, message, child.completions - placed)
