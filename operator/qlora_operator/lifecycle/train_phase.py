"""The train phase: follows a training attempt from its Job to its end, and decides whether to retry."""

from dataclasses import replace
from datetime import datetime, timedelta
from typing import Final

from qlora_api.names import Phase, train_job_name
from qlora_api.reasons import NORMAL_REASONS, Reason, RetryAction
from qlora_api.v1alpha1 import Attempt
from qlora_operator.lifecycle.context import ReconcileContext, heartbeat_deadline
from qlora_operator.lifecycle.gang import classify_child
from qlora_operator.lifecycle.retry_policy import (
    AT_ONCE,
    MOST_ATTEMPTS,
    choose_remedy,
    shrink,
    time_left,
    used_attempts,
)
from qlora_operator.lifecycle.retry_request import budgeted_attempts
from qlora_operator.models import Action, ChildJob, Decision, Job, JobState, Pod, Stage
from qlora_planner.validation import Violation

MAX_LOST_ATTEMPTS: Final = 3
"""Give up after so many training Jobs without a termination message: something keeps deleting them."""
PREPARE_SUCCESS_REASONS: Final = frozenset({Reason.PREPARED, Reason.ALREADY_PUBLISHED})
"""Reasons of a termination message with which a preparation succeeds."""
_REPORTED_PHASES: Final = {
    Phase.TRAINING: Reason.TRAINING,
    Phase.EVALUATING: Reason.EVALUATING,
    Phase.PUBLISHING: Reason.PUBLISHING,
}
"""Phases that a running training pod reports."""


def make_attempt(job: Job, number: int) -> Attempt:
    """Return a new attempt that follows the recorded plan."""
    plan = job.status.plan
    return Attempt(
        number=number,
        job=train_job_name(job.ref.name, number),
        micro_batch_size=plan.micro_batch_size if plan else None,
    )


def observed_attempt(job: Job, train: ChildJob) -> Attempt:
    """Return an attempt with what its Job and pods show: start time and node."""
    pod = _decisive_pod(train)
    started = [pod.started_at for pod in train.pods if pod.started_at is not None]
    observed = {"started_at": min(started, default=None), "node": pod.node if pod else ""}
    return make_attempt(job, train.attempt).model_copy(update=observed)


def _decisive_pod(train: ChildJob) -> Pod | None:
    """Return the pod that failed first, or the pod with index 0."""
    ended = [pod for pod in train.pods if pod.exit is not None and pod.exit.code != 0]
    return min(ended, key=_exit_time, default=train.pod)


def _exit_time(pod: Pod) -> float:
    return pod.exit.finished_at.timestamp() if pod.exit and pod.exit.finished_at else 0.0


def follow_training(job: Job, train: ChildJob, context: ReconcileContext) -> Decision:
    """Decide what follows from the state of a training Job."""
    state, attempt = classify_child(job, train, context.now), observed_attempt(job, train)
    if state.stage is Stage.LOST:
        return decide_lost(attempt, context.now)
    if state.stage is Stage.WAITING:
        phase = Phase.QUEUED if state.reason is Reason.QUEUED else Phase.SCHEDULING
        return Decision(phase, state.reason, state.message, attempt=attempt, requeue_at=state.requeue_at)
    if state.stage is Stage.RUNNING:
        return _follow_running(job, train, state, attempt, context)
    return _end_training(job, state, *_correct_clock_skew(attempt, train.ended_at(context.now), context.now))


def _correct_clock_skew(attempt: Attempt, end: datetime, now: datetime) -> tuple[Attempt, datetime]:
    """Shift the times of an attempt if its node's clock is ahead of ours, or the next attempt would have to wait."""
    ahead = end - now
    if ahead <= timedelta(0):
        return attempt, end
    start = attempt.started_at - ahead if attempt.started_at else None
    return attempt.model_copy(update={"started_at": start}), now


def _follow_running(
    job: Job, train: ChildJob, state: JobState, attempt: Attempt, context: ReconcileContext
) -> Decision:
    hung_at = heartbeat_deadline(job, train, context)
    if hung_at is not None and context.now >= hung_at:
        pod = train.pod.name if train.pod else train.name
        message = f"pod {pod} has not reported since {_describe_last_report(job, context)}"
        return _end_training(job, JobState(Stage.ENDED, Reason.HEARTBEAT_LOST, message), attempt, context.now)
    report = context.last_report
    phase = report.phase if report and report.phase in _REPORTED_PHASES else Phase.TRAINING
    rechecks = [moment for moment in (hung_at, state.requeue_at) if moment is not None]
    message = state.message or _describe_run(train)
    return Decision(phase, _REPORTED_PHASES[phase], message, attempt=attempt, requeue_at=min(rechecks, default=None))


def _describe_last_report(job: Job, context: ReconcileContext) -> str:
    report = context.last_report or job.status.last_report
    return f"{report.updated_at:%Y-%m-%d %H:%M:%S} UTC (spec.deadlines.heartbeat)" if report else "it started"


def _describe_run(train: ChildJob) -> str:
    if len(train.pods) > 1:
        return f"{len(train.pods)} pods run on {len({pod.node for pod in train.pods})} nodes"
    return f"pod {train.pod.name} runs on node {train.pod.node}" if train.pod else f"Job {train.name} runs"


def decide_published(state: JobState, attempt: Attempt, at: datetime) -> Decision | None:
    """Return the success of an attempt that has published, else None."""
    result = state.termination_message.result if state.termination_message else None
    if state.reason is not Reason.PUBLISHED or result is None:
        return None
    message = f"the adapter is published as {result.adapter}"
    ended = attempt.model_copy(update={"reason": Reason.PUBLISHED, "message": "", "finished_at": at})
    return Decision(Phase.SUCCEEDED, Reason.PUBLISHED, message, result=result, attempt=ended)


def decide_failed(state: JobState) -> Decision:
    """Fail the run; a pod cannot end with the reason of a run that proceeds, nor succeed without the details."""
    if state.reason in NORMAL_REASONS:
        message = f"the termination message says {state.reason}, but lacks the details that belong to it"
        return Decision(Phase.FAILED, Reason.TRAINER_ERROR, message)
    return Decision(Phase.FAILED, state.reason, state.message)


def decide_lost(attempt: Attempt, now: datetime) -> Decision:
    """Record an attempt without a known end, and prepare again: prepare finds the result if it was published."""
    message = f"Job {attempt.job} disappeared without a termination message"
    lost = attempt.model_copy(update={"reason": Reason.POD_LOST, "message": message, "finished_at": now})
    if lost.number >= MAX_LOST_ATTEMPTS:
        final_message = (
            f"{message}, as did {lost.number - 1} before it; find out what deletes Jobs or pods in this namespace"
        )
        return Decision(Phase.FAILED, Reason.POD_LOST, final_message, attempt=lost)
    message = f"{message}; preparation runs again"
    return Decision(
        Phase.PREPARING, Reason.POD_LOST, message, Action.DELETE_PREPARE_JOB, attempt=lost, requeue_after=AT_ONCE
    )


def _end_training(job: Job, state: JobState, attempt: Attempt, at: datetime) -> Decision:
    if decision := decide_published(state, attempt, at):
        return decision
    failed = decide_failed(state)
    ended = attempt.model_copy(update={"reason": failed.reason, "message": failed.message, "finished_at": at})
    decision = _retry(job, state, ended) or failed
    return replace(
        decision,
        attempt=ended,
        checkpoint=state.termination_message.checkpoint if state.termination_message else None,
    )


def _retry(job: Job, state: JobState, ended: Attempt) -> Decision | None:
    """Return the decision to retry, if another attempt can fix the failure; it resumes from the last checkpoint."""
    plan = job.status.plan
    attempts = (*(other for other in budgeted_attempts(job.status) if other.number < ended.number), ended)
    action = choose_remedy(state, plan) if plan else None
    if action is None or plan is None:
        return None
    if exhausted := _exhausted(job, attempts):
        message = f"{exhausted.message}; the last one ended with {ended.reason}: {state.message}"
        return Decision(Phase.FAILED, exhausted.reason, message)
    plan = shrink(plan, ended.number) if action is RetryAction.SHRINK_MICRO_BATCH else plan
    message = f"attempt {ended.number} ended: {state.message}; the next one resumes from the last checkpoint"
    return Decision(Phase.SCHEDULING, state.reason, message, plan=plan, requeue_after=AT_ONCE)


def _exhausted(job: Job, attempts: tuple[Attempt, ...]) -> Violation | None:
    """Return the limit that another attempt would exceed, if any."""
    limit = job.spec.retries.max_attempts
    if (used := used_attempts(attempts)) >= limit:
        return Violation(Reason.RETRIES_EXHAUSTED, f"{used} of {limit} attempts (spec.retries.maxAttempts) failed")
    if len(attempts) >= MOST_ATTEMPTS:
        return Violation(Reason.RETRIES_EXHAUSTED, f"{len(attempts)} attempts ended, most of them by disruptions")
    if time_left(job.spec.deadlines, attempts) <= AT_ONCE:
        message = f"all attempts together exceeded {job.spec.deadlines.total} (spec.deadlines.total)"
        return Violation(Reason.DEADLINE_EXCEEDED, message)
    return None
