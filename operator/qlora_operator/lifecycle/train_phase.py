"""The train phase: follows a training attempt from its Job to its end, and decides whether to retry."""

from collections.abc import Collection
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Final

from qlora_api.names import Phase, train_job_name
from qlora_api.reasons import NORMAL_REASONS, REASONS, Domain, Reason, RetryAction
from qlora_api.result import is_below
from qlora_api.v1alpha1 import Attempt
from qlora_operator.lifecycle.budgets import find_exhausted, time_left
from qlora_operator.lifecycle.container_time import close_start, container_end, stop_counting, track_starts
from qlora_operator.lifecycle.context import NODE_FAILURES_LOAD, ReconcileContext, heartbeat_deadline
from qlora_operator.lifecycle.exit_reasons import POD_CREATION_TIME
from qlora_operator.lifecycle.gang import classify_child
from qlora_operator.lifecycle.job_deadline import SAFETY_MARGIN
from qlora_operator.lifecycle.node_health import avoided_nodes, find_released, next_release
from qlora_operator.lifecycle.queue import describe_wait
from qlora_operator.lifecycle.retry_policy import AT_ONCE, choose_remedy, find_domain, shrink
from qlora_operator.models import ChildJob, Decision, Job, JobState, Pod, Stage, earliest

DEADLINE_TOLERANCE: Final = timedelta(minutes=1)
"""By how much container time may fall short of a deadline that it met: times are whole seconds, of several clocks."""
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
    plan, checkpoint = job.status.plan, job.status.checkpoint
    return Attempt(
        number=number,
        job=train_job_name(job.ref.name, number),
        micro_batch_size=plan.micro_batch_size if plan else None,
        checkpoint_step=checkpoint.step if checkpoint else None,
    )


def recorded_attempt(job: Job, number: int) -> Attempt:
    """Return an attempt as the last status has it; a new one if it is not there."""
    recorded = next((attempt for attempt in job.status.attempts if attempt.number == number), None)
    return recorded or make_attempt(job, number)


def observed_attempt(job: Job, train: ChildJob, context: ReconcileContext) -> Attempt:
    """Return an attempt with what its Job and pods show: the times of its containers, and the node."""
    pod = _decisive_pod(train)
    observed = {"node": pod.node if pod else "", "avoided_nodes": train.avoided_nodes}
    attempt = make_attempt(job, train.attempt).model_copy(update=observed)
    recorded = recorded_attempt(job, train.attempt)
    return track_starts(attempt, recorded, train, _heard_at(job, context), context.now)


def _container_end(job: Job, train: ChildJob, attempt: Attempt, context: ReconcileContext) -> datetime:
    return container_end(train, attempt, _heard_at(job, context), context.now)


def _heard_at(job: Job, context: ReconcileContext) -> datetime | None:
    """Return when a pod of the run reported last."""
    report = context.last_report or job.status.last_report
    return report.updated_at if report else None


def end_attempt(attempt: Attempt, reason: Reason, message: str, at: datetime, domain: Domain | None = None) -> Attempt:
    """Return an attempt that has ended; the domain is that of its reason unless another one is given."""
    domain = domain or REASONS[reason].domain
    ended = {"reason": reason, "domain": domain, "message": message, "finished_at": at}
    return close_start(attempt, at).model_copy(update=ended)


def _decisive_pod(train: ChildJob) -> Pod | None:
    """Return the pod that failed first, or the pod with index 0."""
    ended = [pod for pod in train.pods if pod.exit is not None and pod.exit.code != 0]
    return min(ended, key=_exit_time, default=train.pod)


def _exit_time(pod: Pod) -> float:
    return pod.exit.finished_at.timestamp() if pod.exit and pod.exit.finished_at else 0.0


def follow_training(job: Job, train: ChildJob, context: ReconcileContext) -> Decision:
    """Decide what follows from the state of a training Job."""
    state, attempt = classify_child(job, train, context.now), observed_attempt(job, train, context)
    if state.stage is Stage.LOST:
        return decide_lost(job, attempt, _container_end(job, train, attempt, context), state.message)
    if state.reason is Reason.QUEUED:
        message = _describe_queued(job, train, state, attempt, context.now)
        release = next_release(job.status.attempts, context.quarantined_nodes, context.now)
        requeue_at = earliest(context.now, next_suspension_lookup(train, context.now), state.requeue_at, release)
        return Decision(Phase.QUEUED, Reason.QUEUED, message, attempt=attempt, requeue_at=requeue_at)
    if state.stage is Stage.WAITING:
        if state.reason is Reason.UNSCHEDULABLE and (released := _follow_unschedulable(job, state, attempt, context)):
            return released
        return Decision(Phase.SCHEDULING, state.reason, state.message, attempt=attempt, requeue_at=state.requeue_at)
    if state.stage is Stage.RUNNING:
        return _follow_running(job, train, state, attempt, context)
    end = _container_end(job, train, attempt, context)
    state = _check_deadline(job, train, state, end_attempt(attempt, state.reason, "", end))
    return _end_training(job, state, attempt, end, context)


def _follow_unschedulable(job: Job, state: JobState, attempt: Attempt, context: ReconcileContext) -> Decision | None:
    """Replace an attempt whose pods may not use a node that is no longer avoided; wait while all of them still are."""
    if not context.node_failures_known and attempt.avoided_nodes:
        message = f"{state.message}; avoided, because attempts failed there: {', '.join(attempt.avoided_nodes)}"
        again = earliest(context.now, context.now + NODE_FAILURES_LOAD, state.requeue_at)
        return Decision(Phase.SCHEDULING, state.reason, message, attempt=attempt, requeue_at=again)
    avoided = avoided_nodes(job.status.attempts, context.quarantined_nodes, context.now)
    if released := find_released(attempt, avoided):
        nodes = ", ".join(released)
        message = f"no node fits but {nodes}, which the next attempt may use again: {state.message}"
        ended = JobState(Stage.ENDED, Reason.UNSCHEDULABLE, message)
        return _end_training(job, ended, attempt, context.now, context)
    if not attempt.avoided_nodes:
        return None
    release = min(avoided[node] for node in attempt.avoided_nodes)
    message = f"{state.message}; avoided until {release:%H:%M} UTC, because attempts failed there: "
    message += ", ".join(attempt.avoided_nodes)
    recheck = earliest(context.now, release, state.requeue_at)
    return Decision(Phase.SCHEDULING, state.reason, message, attempt=attempt, requeue_at=recheck)


def _check_deadline(job: Job, train: ChildJob, state: JobState, ended: Attempt) -> JobState:
    """Return how a Job ended; if its deadline passed while its containers waited, the attempt was interrupted."""
    attempts = (*_earlier_attempts(job, ended), ended)
    end = ended.finished_at or job.created_at
    left = time_left(job.spec.deadlines, job.status, attempts, end)
    if state.reason is not Reason.DEADLINE_EXCEEDED or left <= DEADLINE_TOLERANCE:
        return state
    message = f"Job {train.name} exceeded its activeDeadlineSeconds before its containers ran for spec.deadlines.total"
    return replace(state, reason=Reason.INTERRUPTED, message=message)


def _describe_queued(job: Job, train: ChildJob, state: JobState, attempt: Attempt, now: datetime) -> str:
    """Return what an attempt waits for; one that has run says who suspended it, as far as that is known."""
    if not attempt.container_seconds:
        return describe_wait(job, train, state.message, now)
    sentence = f"Job {train.name} was suspended and resumes from its last checkpoint once it is admitted again"
    why = train.event_message or (train.workload.evicted if train.workload else "")
    if not why and job.status.phase is Phase.QUEUED and job.status.message:
        return job.status.message
    return describe_wait(job, train, f"{sentence}: {why or 'its queue took its nodes back'}", now)


def preempted(job: Job, train: ChildJob) -> bool:
    """Return whether a queue has suspended the Job of an attempt that ran."""
    ran = any(attempt.number == train.attempt and attempt.started_at for attempt in job.status.attempts)
    return train.suspended and not train.finished and ran


def next_suspension_lookup(train: ChildJob, now: datetime) -> datetime | None:
    """Return when the Event of a suspension should be there: its queue records it after it has suspended the Job."""
    return earliest(now, train.suspended_at + POD_CREATION_TIME if train.suspended_at else None)


def _follow_running(
    job: Job, train: ChildJob, state: JobState, attempt: Attempt, context: ReconcileContext
) -> Decision:
    others = [known for known in job.status.attempts if known.number != attempt.number]
    left = time_left(job.spec.deadlines, job.status, (*others, attempt), context.now)
    hung_at = heartbeat_deadline(job, train, context)
    if hung_at is not None and context.now >= hung_at and left > AT_ONCE:
        pod = train.pod.name if train.pod else train.name
        message = f"pod {pod} has not reported since {_describe_last_report(job, context)}"
        return _end_training(job, JobState(Stage.ENDED, Reason.HEARTBEAT_LOST, message), attempt, context.now, context)
    limit = f"all attempts together ran for {job.spec.deadlines.total} (spec.deadlines.total)"
    if left <= -SAFETY_MARGIN:  # something refuses to set the deadline of the Job
        ended = JobState(
            Stage.ENDED, Reason.DEADLINE_EXCEEDED, f"{limit}, and Kubernetes did not stop Job {train.name}"
        )
        return _end_training(job, ended, attempt, context.now, context)
    report = context.last_report
    phase = report.phase if report and report.phase in _REPORTED_PHASES else Phase.TRAINING
    requeue_at = earliest(context.now, hung_at, state.requeue_at, context.now + max(left, AT_ONCE))
    message = state.message or _describe_run(train)
    if left <= AT_ONCE:  # job_deadline makes Kubernetes stop it
        message = f"training is being stopped: {limit}"
    return Decision(phase, _REPORTED_PHASES[phase], message, attempt=attempt, requeue_at=requeue_at)


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
    ended = end_attempt(attempt, Reason.PUBLISHED, "", at)
    return Decision(Phase.SUCCEEDED, Reason.PUBLISHED, message, result=result, attempt=ended)


def decide_failed(state: JobState) -> Decision:
    """Fail the run; a pod cannot end with the reason of a run that proceeds, nor succeed without the details."""
    if state.reason in NORMAL_REASONS:
        message = f"the termination message says {state.reason}, but lacks the details that belong to it"
        return Decision(Phase.FAILED, Reason.TRAINER_ERROR, message)
    return Decision(Phase.FAILED, state.reason, state.message)


def decide_deleted(job: Job, train: ChildJob, context: ReconcileContext) -> Decision:
    """Record an attempt whose Job is being deleted and whose trainers have ended."""
    attempt = observed_attempt(job, train, context)
    return decide_lost(job, attempt, _container_end(job, train, attempt, context))


def decide_vanished(job: Job, number: int, context: ReconcileContext) -> Decision:
    """Record an attempt that the status lists and whose Job does not exist."""
    attempt = stop_counting(recorded_attempt(job, number), _heard_at(job, context), context.now)
    return decide_lost(job, attempt, context.now)


def decide_lost(job: Job, attempt: Attempt, at: datetime, message: str = "") -> Decision:
    """Record an attempt without a known end, and prepare again: prepare finds the result if it was published."""
    message = message or f"Job {attempt.job} disappeared without a termination message"
    lost = end_attempt(attempt, Reason.POD_LOST, message, at)
    if exhausted := find_exhausted(job.spec, job.status, (*_earlier_attempts(job, lost), lost), at):
        return Decision(Phase.FAILED, exhausted.reason, f"{exhausted.message}: {message}", attempt=lost)
    message = f"{message}; preparation runs again"
    return Decision(Phase.PREPARING, Reason.POD_LOST, message, attempt=lost, requeue_after=AT_ONCE)


def _earlier_attempts(job: Job, attempt: Attempt) -> tuple[Attempt, ...]:
    return tuple(other for other in job.status.attempts if other.number < attempt.number)


def _end_training(job: Job, state: JobState, attempt: Attempt, at: datetime, context: ReconcileContext) -> Decision:
    if decision := decide_published(state, attempt, at):
        return decision
    failed = decide_failed(state)
    ended = end_attempt(attempt, failed.reason, failed.message, at, state.domain).model_copy(
        update={
            "node": state.node or attempt.node,
            "lacking_pods": state.lacking_pods,
            "checkpoint_step": _newest_checkpoint_step(job, state, context),
        }
    )
    if domain := find_domain(state, job.status.plan, (*_earlier_attempts(job, ended), ended), at):
        state, ended = replace(state, domain=domain), ended.model_copy(update={"domain": domain})
    decision = _retry(job, state, ended, context.bad_nodes) or failed
    return replace(
        decision,
        attempt=ended,
        checkpoint=state.termination_message.checkpoint if state.termination_message else None,
    )


def _newest_checkpoint_step(job: Job, state: JobState, context: ReconcileContext) -> int | None:
    """Return the step of the newest checkpoint of the run that status, report or termination message know."""
    message, report, output = state.termination_message, context.last_report, job.status.output
    reported = report.checkpoint if report else None
    own = reported is not None and output is not None and is_below(reported.uri, output.prefix)
    known = (job.status.checkpoint, message.checkpoint if message else None, reported if own else None)
    return max((checkpoint.step for checkpoint in known if checkpoint is not None), default=None)


def _retry(job: Job, state: JobState, ended: Attempt, bad_nodes: Collection[str]) -> Decision | None:
    """Return the decision to retry, if another attempt can fix the failure; it resumes from the last checkpoint."""
    plan = job.status.plan
    action = choose_remedy(state, plan) if plan else None
    if action is None or plan is None:
        return None
    attempts = (*_earlier_attempts(job, ended), ended)
    plan = shrink(plan, ended.number) if action is RetryAction.SHRINK_MICRO_BATCH else plan
    if exhausted := find_exhausted(job.spec, job.status, attempts, ended.finished_at or job.created_at, bad_nodes):
        message = f"{exhausted.message}; the last one ended with {ended.reason}: {state.message}"
        return Decision(Phase.FAILED, exhausted.reason, message, plan=plan)  # for a run that is continued
    message = f"attempt {ended.number} ended: {state.message}; the next one resumes from the last checkpoint"
    return Decision(Phase.SCHEDULING, state.reason, message, plan=plan, requeue_after=AT_ONCE)
