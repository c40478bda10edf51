"""The prepare phase: from the prepare Job to the plan and the first training Job."""

from dataclasses import replace
from datetime import datetime

from qlora_api.names import Phase, prepare_job_name
from qlora_api.prepared import Prepared
from qlora_api.reasons import Domain, Reason
from qlora_api.result import Result
from qlora_api.v1alpha1 import Plan, Preparation
from qlora_operator.lifecycle.exit_reasons import describe_missing_pod
from qlora_operator.lifecycle.gang import classify_child
from qlora_operator.lifecycle.planning import WAITING_FOR_NODES, plan_run
from qlora_operator.lifecycle.prepare_retries import (
    LONGEST_PAUSE,
    count_failure,
    current_preparation,
    describe_end,
    describe_retries,
    is_unexplained,
    may_be_retried,
    next_preparation,
    next_try,
    retry_time,
)
from qlora_operator.lifecycle.queue import describe_wait
from qlora_operator.lifecycle.retry_policy import AT_ONCE
from qlora_operator.lifecycle.train_phase import PREPARE_SUCCESS_REASONS, decide_failed, make_attempt
from qlora_operator.models import Action, ChildJob, Decision, Job, JobState, Observation, Stage


def follow_preparation(job: Job, children: Observation, number: int, now: datetime) -> Decision:
    """Decide what follows from the state of the prepare Job; its results are recorded before training starts."""
    current = current_preparation(job.status, children)
    decision = _wait_for_retry(job, current, now) or _follow_job(job, children, current, number, now)
    return replace(decision, preparation=decision.preparation or current)


def _wait_for_retry(job: Job, current: Preparation, now: datetime) -> Decision | None:
    """Wait for the end of the back-off after a recorded failure, then record the number of the next prepare Job."""
    if current.reason is None or current.retry_at is None or current.reason in WAITING_FOR_NODES:
        return None
    waiting = Decision(Phase.PREPARING, current.reason, describe_retries(job, current))
    if now < current.retry_at:
        return replace(waiting, requeue_at=current.retry_at)
    return replace(waiting, preparation=next_try(current, now), requeue_after=AT_ONCE)


def _follow_job(job: Job, children: Observation, current: Preparation, number: int, now: datetime) -> Decision:
    prepare = children.prepare
    if prepare is None or prepare.attempt < current.number:
        message = describe_missing_pod(prepare_job_name(job.ref.name, current.number))
        return _keep_failure_visible(job, current, JobState(Stage.WAITING, Reason.PREPARING, message), Action.PREPARE)
    if prepare.deleting:
        message = f"Job {prepare.name} is being deleted; preparation runs again"
        following = next_preparation(current)
        return Decision(Phase.PREPARING, Reason.PREPARING, message, preparation=following, requeue_after=AT_ONCE)
    state = classify_child(job, prepare, now)
    if state.stage not in {Stage.ENDED, Stage.LOST}:
        return _keep_failure_visible(job, current, _explain_queue(job, prepare, state, now))
    prepared = state.termination_message.prepared if state.termination_message else None
    if state.reason not in PREPARE_SUCCESS_REASONS or prepared is None:
        return _retry_preparation(job, prepare, state, current, now) or decide_failed(state)
    if prepared.published is not None:
        decision = _decide_published(prepared, prepared.published)
    else:
        plan = plan_run(job, prepared, children.gpu_nodes, current, now)
        decision = plan if isinstance(plan, Decision) else _start_training(job, prepared, plan, number)
    return replace(decision, preparation=decision.preparation or Preparation(number=current.number))


def _keep_failure_visible(job: Job, current: Preparation, state: JobState, action: Action = Action.NONE) -> Decision:
    """Show the last failure while a preparation is tried again, unless something else holds it up."""
    reason, message = state.reason, state.message or "model, dataset and output are being checked"
    if current.reason is not None and reason is Reason.PREPARING:
        reason, message = current.reason, describe_retries(job, current)
    return Decision(Phase.PREPARING, reason, message, action, requeue_at=state.requeue_at)


def _explain_queue(job: Job, prepare: ChildJob, state: JobState, now: datetime) -> JobState:
    if state.reason is not Reason.QUEUED:
        return state
    return replace(state, message=describe_wait(job, prepare, state.message, now))


def _retry_preparation(
    job: Job, prepare: ChildJob, state: JobState, current: Preparation, now: datetime
) -> Decision | None:
    """Record a failure, and when it is tried again or that it is not; None if manifest, dataset or a limit is wrong."""
    if state.domain is Domain.RUN:
        return None
    if not may_be_retried(state.reason) and not is_unexplained(prepare, state):
        return None
    now = now.replace(microsecond=0)
    if job.status.preparation is None and (job.status.phase, job.status.reason) == (Phase.PREPARING, state.reason):
        return _retry_unrecorded(prepare, state, now)
    failed = count_failure(current, prepare, state, now)
    retry_at = retry_time(job, failed, now)
    if retry_at is None:
        # Whatever starts a failed run again needs another preparation.
        failure = decide_failed(replace(state, message=describe_end(failed)))
        return replace(failure, preparation=next_preparation(current))
    failed = failed.model_copy(update={"retry_at": retry_at})
    message = describe_retries(job, failed)
    return Decision(Phase.PREPARING, state.reason, message, preparation=failed, requeue_at=retry_at)


def _retry_unrecorded(prepare: ChildJob, state: JobState, now: datetime) -> Decision:
    """Prepare again after a pause, where a CRD that is older than the operator does not store what was recorded."""
    retry_at = prepare.ended_at(prepare.created_at) + LONGEST_PAUSE
    message = f"{state.message}; it is tried again (the installed CRD is older than the operator: upgrade it)"
    if now < retry_at:
        return Decision(Phase.PREPARING, state.reason, message, requeue_at=retry_at)
    following = Preparation(number=prepare.attempt + 1)
    return Decision(Phase.PREPARING, state.reason, message, Action.PREPARE, preparation=following)


def _decide_published(prepared: Prepared, result: Result) -> Decision:
    message = f"the same result was published before as {result.adapter}"
    return Decision(Phase.SUCCEEDED, Reason.ALREADY_PUBLISHED, message, prepared=prepared, result=result)


def _start_training(job: Job, prepared: Prepared, plan: Plan, number: int) -> Decision:
    """Record the plan; once it is in the status, create the Job of the attempt."""
    if job.status.plan != plan or job.status.output is None or job.status.output.digest != prepared.digest:
        message = "model, dataset and output were checked"
        return Decision(Phase.SCHEDULING, Reason.PREPARED, message, plan=plan, prepared=prepared, requeue_after=AT_ONCE)
    attempt = make_attempt(job, number)
    return Decision(
        Phase.SCHEDULING,
        Reason.SCHEDULING,
        describe_missing_pod(attempt.job),
        Action.TRAIN,
        plan=plan,
        prepared=prepared,
        attempt=attempt,
    )
