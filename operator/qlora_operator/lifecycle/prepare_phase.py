"""The prepare phase: from the prepare Job to the plan and the first training Job."""

from datetime import datetime, timedelta
from typing import Final

from qlora_api.names import Phase, prepare_job_name
from qlora_api.prepared import Prepared
from qlora_api.reasons import REASONS, Reason, RetryAction
from qlora_api.v1alpha1 import Plan
from qlora_operator.lifecycle.context import startup_timeout
from qlora_operator.lifecycle.exit_reasons import describe_missing_pod
from qlora_operator.lifecycle.gang import classify_child
from qlora_operator.lifecycle.retry_policy import AT_ONCE
from qlora_operator.lifecycle.retry_request import last_retry
from qlora_operator.lifecycle.train_phase import PREPARE_SUCCESS_REASONS, decide_failed, make_attempt
from qlora_operator.models import Action, ChildJob, Decision, Job, JobState, Manifest, Observation, Stage
from qlora_planner import make_plan
from qlora_planner.gpu_inventory import read_gpu_inventory
from qlora_planner.models.shapes import MismatchError
from qlora_planner.sizing import DoesNotFitError

PREPARE_PAUSE: Final = timedelta(seconds=15)
"""Back-off between two prepare Jobs when an object store or the hub is unavailable."""


def follow_preparation(job: Job, children: Observation, number: int, now: datetime) -> Decision:
    """Decide what follows from the state of the prepare Job; its results are recorded before training starts."""
    prepare = children.prepare
    if prepare is None:
        message = describe_missing_pod(prepare_job_name(job.ref.name))
        return Decision(Phase.PREPARING, Reason.PREPARING, message, Action.PREPARE)
    state = classify_child(job, prepare, now)
    if state.stage is Stage.LOST:
        return Decision(Phase.PREPARING, Reason.PREPARING, state.message, Action.DELETE_ALL_JOBS)
    if state.stage is not Stage.ENDED:
        message = state.message or "model, dataset and output are being checked"
        return Decision(Phase.PREPARING, state.reason, message, requeue_at=state.requeue_at)
    prepared = state.termination_message.prepared if state.termination_message else None
    if state.reason not in PREPARE_SUCCESS_REASONS or prepared is None:
        return _retry_preparation(job, prepare, state, now) or decide_failed(state)
    return _after_preparation(job, prepared, children.gpu_nodes, number)


def _retry_preparation(job: Job, prepare: ChildJob, state: JobState, now: datetime) -> Decision | None:
    """Retry prepare after a transient failure, until spec.deadlines.startup has passed; no GPU is held meanwhile."""
    begun = last_retry(job.status) or job.created_at
    if REASONS[state.reason].retry is not RetryAction.RESUME or now >= begun + startup_timeout(job):
        return None
    retry_time = prepare.ended_at(now) + PREPARE_PAUSE
    message = f"{state.message}; preparation is retried"
    if now < retry_time:
        return Decision(Phase.PREPARING, state.reason, message, requeue_at=retry_time)
    return Decision(Phase.PREPARING, state.reason, message, Action.DELETE_ALL_JOBS)


def _after_preparation(job: Job, prepared: Prepared, gpu_nodes: tuple[Manifest, ...], number: int) -> Decision:
    if prepared.published is not None:
        message = f"the same result was published before as {prepared.published.adapter}"
        return Decision(
            Phase.SUCCEEDED, Reason.ALREADY_PUBLISHED, message, prepared=prepared, result=prepared.published
        )
    try:
        plan = _plan_once(job, prepared, gpu_nodes)
    except DoesNotFitError as error:
        message = f"spec.model.uri: {prepared.model.architecture} {error}"
        return Decision(Phase.FAILED, Reason.DOES_NOT_FIT, message, prepared=prepared)
    except MismatchError as error:
        return Decision(Phase.FAILED, Reason.INVALID_SPEC, str(error), prepared=prepared)
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


def _plan_once(job: Job, prepared: Prepared, gpu_nodes: tuple[Manifest, ...]) -> Plan:
    """Return the recorded plan if there is one, so that neither an upgrade nor new nodes change a run halfway."""
    output = job.status.output
    if job.status.plan is not None and output is not None and output.digest == prepared.digest:
        return job.status.plan
    return make_plan(job.spec, prepared, read_gpu_inventory(gpu_nodes, job.spec.resources))
