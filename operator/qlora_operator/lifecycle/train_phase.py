"""A training attempt, from its Job to its end, and whether another one follows."""

from dataclasses import replace
from datetime import datetime, timedelta
from typing import Final

from qlora_api.names import Phase, train_job_name
from qlora_api.reasons import Reason, RetryAction
from qlora_api.v1alpha1 import Attempt
from qlora_operator.lifecycle.context import ReconcileContext, heartbeat_deadline, startup_timeout
from qlora_operator.lifecycle.gang import classify
from qlora_operator.lifecycle.retry_policy import (
    AT_ONCE,
    MOST_ATTEMPTS,
    choose_remedy,
    shrink,
    time_left,
    used_attempts,
)
from qlora_operator.models import Action, ChildJob, Decision, Job, JobState, Pod, Stage
from qlora_planner.validation import Violation

MAX_LOST_ATTEMPTS: Final = 3
"""After this many training Jobs that ended without a termination message, something removes them: give up."""
MAX_ATTEMPT_MESSAGE: Final = 4096
"""Bound of status.attempts[].message."""
PREPARE_SUCCESS_REASONS: Final = frozenset({Reason.PREPARED, Reason.ALREADY_PUBLISHED})
"""Reasons of a termination message with which a preparation succeeds."""
_REPORTED_PHASES: Final = {
    Phase.TRAINING: Reason.TRAINING,
    Phase.EVALUATING: Reason.EVALUATING,
    Phase.PUBLISHING: Reason.PUBLISHING,
}
"""Phases that a running training pod reports."""


def make_attempt(job: Job, number: int) -> Attempt:
    """Return an attempt that follows the plan on record."""
    plan = job.status.plan
    return Attempt(
        number=number,
        job=train_job_name(job.ref.name, number),
        micro_batch_size=plan.micro_batch_size if plan else None,
    )


def observed_attempt(job: Job, train: ChildJob) -> Attempt:
    """Return an attempt as its Job shows it."""
    pod = _decisive_pod(train)
    started = [pod.started_at for pod in train.pods if pod.started_at is not None]
    known = {"started_at": min(started, default=None), "node": pod.node if pod else ""}
    return make_attempt(job, train.attempt).model_copy(update=known)


def _decisive_pod(train: ChildJob) -> Pod | None:
    """Return the pod that ended first badly, or the first one of the run."""
    ended = [pod for pod in train.pods if pod.exit is not None and pod.exit.code != 0]
    return min(ended, key=_exit_time, default=train.pod)


def _exit_time(pod: Pod) -> float:
    return pod.exit.finished_at.timestamp() if pod.exit and pod.exit.finished_at else 0.0


def follow_training(job: Job, train: ChildJob, context: ReconcileContext) -> Decision:
    """Say how far an attempt is."""
    verdict, attempt = classify(train, startup_timeout(job), context.now), observed_attempt(job, train)
    if verdict.stage is Stage.LOST:
        return decide_lost(attempt, context.now)
    if verdict.stage is Stage.WAITING:
        phase = Phase.QUEUED if verdict.reason is Reason.QUEUED else Phase.SCHEDULING
        return Decision(phase, verdict.reason, verdict.message, attempt=attempt, requeue_at=verdict.requeue_at)
    if verdict.stage is Stage.RUNNING:
        return _follow_running(job, train, verdict, attempt, context)
    return _end_training(job, verdict, *_correct_clock_skew(attempt, train.ended_at(context.now), context.now))


def _correct_clock_skew(attempt: Attempt, end: datetime, now: datetime) -> tuple[Attempt, datetime]:
    """Return an attempt and its end as they are by our clock, where a node's is ahead: the next one must not wait."""
    ahead = end - now
    if ahead <= timedelta(0):
        return attempt, end
    start = attempt.started_at - ahead if attempt.started_at else None
    return attempt.model_copy(update={"started_at": start}), now


def _follow_running(
    job: Job, train: ChildJob, verdict: JobState, attempt: Attempt, context: ReconcileContext
) -> Decision:
    silent = heartbeat_deadline(job, train, context)
    if silent is not None and context.now >= silent:
        pod = train.pod.name if train.pod else train.name
        message = f"pod {pod} has not reported since {_describe_last_report(job, context)}"
        return _end_training(job, JobState(Stage.ENDED, Reason.HEARTBEAT_LOST, message), attempt, context.now)
    live = context.last_report
    phase = live.phase if live and live.phase in _REPORTED_PHASES else Phase.TRAINING
    rechecks = [moment for moment in (silent, verdict.requeue_at) if moment is not None]
    message = verdict.message or _describe_run(train)
    return Decision(phase, _REPORTED_PHASES[phase], message, attempt=attempt, requeue_at=min(rechecks, default=None))


def _describe_last_report(job: Job, context: ReconcileContext) -> str:
    report = context.last_report or job.status.last_report
    return f"{report.updated_at:%Y-%m-%d %H:%M:%S} UTC (spec.deadlines.heartbeat)" if report else "it started"


def _describe_run(train: ChildJob) -> str:
    if len(train.pods) > 1:
        return f"{len(train.pods)} pods run on {len({pod.node for pod in train.pods})} nodes"
    return f"pod {train.pod.name} runs on node {train.pod.node}" if train.pod else f"Job {train.name} runs"


def decide_published(verdict: JobState, attempt: Attempt, at: datetime) -> Decision | None:
    """Return the success of an attempt that published."""
    result = verdict.termination_message.result if verdict.termination_message else None
    if verdict.reason is not Reason.PUBLISHED or result is None:
        return None
    message = f"the adapter is published as {result.adapter}"
    ended = attempt.model_copy(update={"reason": Reason.PUBLISHED, "message": "", "finished_at": at})
    return Decision(Phase.SUCCEEDED, Reason.PUBLISHED, message, result=result, attempt=ended)


def decide_failed(verdict: JobState) -> Decision:
    """End the run; a good reason without its facts is the trainer's mistake."""
    if verdict.reason in {*PREPARE_SUCCESS_REASONS, Reason.PUBLISHED}:
        message = f"the termination message says {verdict.reason}, but lacks the details that belong to it"
        return Decision(Phase.FAILED, Reason.TRAINER_ERROR, message)
    return Decision(Phase.FAILED, verdict.reason, verdict.message)


def decide_lost(attempt: Attempt, now: datetime) -> Decision:
    """Record an attempt of which nobody can say how it ended; what it published is found by another preparation."""
    message = f"Job {attempt.job} disappeared without a termination message"
    lost = attempt.model_copy(update={"reason": Reason.POD_LOST, "message": message, "finished_at": now})
    if lost.number >= MAX_LOST_ATTEMPTS:
        again = f"{message}, as did {lost.number - 1} before it; find out what deletes Jobs or pods in this namespace"
        return Decision(Phase.FAILED, Reason.POD_LOST, again, attempt=lost)
    message = f"{message}; preparation runs again"
    return Decision(
        Phase.PREPARING, Reason.POD_LOST, message, Action.DELETE_PREPARE_JOB, attempt=lost, requeue_after=AT_ONCE
    )


def _end_training(job: Job, verdict: JobState, attempt: Attempt, at: datetime) -> Decision:
    if decision := decide_published(verdict, attempt, at):
        return decision
    failed = decide_failed(verdict)
    ended = attempt.model_copy(
        update={"reason": failed.reason, "message": failed.message[:MAX_ATTEMPT_MESSAGE], "finished_at": at}
    )
    decision = _retry(job, verdict, ended) or failed
    return replace(
        decision,
        attempt=ended,
        checkpoint=verdict.termination_message.checkpoint if verdict.termination_message else None,
    )


def _retry(job: Job, verdict: JobState, ended: Attempt) -> Decision | None:
    """Start another attempt where that can fix the failure; it resumes from the last checkpoint."""
    plan, attempts = job.status.plan, (*job.status.attempts[: ended.number - 1], ended)
    remedy = choose_remedy(verdict, plan) if plan else None
    if remedy is None or plan is None:
        return None
    if exhausted := _exhausted(job, attempts):
        message = f"{exhausted.message}; the last one ended with {ended.reason}: {verdict.message}"
        return Decision(Phase.FAILED, exhausted.reason, message)
    plan = shrink(plan, ended.number) if remedy is RetryAction.SHRINK_MICRO_BATCH else plan
    message = f"attempt {ended.number} ended: {verdict.message}; the next one resumes from the last checkpoint"
    return Decision(Phase.SCHEDULING, verdict.reason, message, plan=plan, requeue_after=AT_ONCE)


def _exhausted(job: Job, attempts: tuple[Attempt, ...]) -> Violation | None:
    """Say which bound of the spec another attempt would break."""
    most = job.spec.retries.max_attempts
    if (used := used_attempts(attempts)) >= most:
        return Violation(Reason.RETRIES_EXHAUSTED, f"{used} of {most} attempts (spec.retries.maxAttempts) failed")
    if len(attempts) >= MOST_ATTEMPTS:
        return Violation(Reason.RETRIES_EXHAUSTED, f"{len(attempts)} attempts ended, most of them by disruptions")
    if time_left(job.spec.deadlines, attempts) <= AT_ONCE:
        message = f"all attempts together exceeded {job.spec.deadlines.total} (spec.deadlines.total)"
        return Violation(Reason.DEADLINE_EXCEEDED, message)
    return None
