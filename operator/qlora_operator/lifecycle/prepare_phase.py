"""The preparation, from its Job to the plan, and to the first Job of a training attempt."""

from datetime import datetime, timedelta
from typing import Final

from qlora_api.names import Phase, prepare_job_name
from qlora_api.prepared import Prepared
from qlora_api.reasons import REASONS, Reason, RetryAction
from qlora_api.v1alpha1 import Plan
from qlora_operator.lifecycle.context import startup_timeout
from qlora_operator.lifecycle.exit_reasons import describe_missing_pod
from qlora_operator.lifecycle.gang import classify
from qlora_operator.lifecycle.retry_policy import AT_ONCE
from qlora_operator.lifecycle.train_phase import PREPARE_SUCCESS_REASONS, decide_failed, make_attempt
from qlora_operator.models import Action, ChildJob, Decision, Job, JobState, Manifest, Observation, Stage
from qlora_planner import make_plan
from qlora_planner.gpu_inventory import read_gpu_inventory
from qlora_planner.sizing import DoesNotFitError

PREPARE_PAUSE: Final = timedelta(seconds=15)
"""Between two preparations, where an object store or a hub did not answer."""


def follow_preparation(job: Job, children: Observation, number: int, now: datetime) -> Decision:
    """Say how far the preparation is; once it is through, its facts are recorded, and then the training starts."""
    prepare = children.prepare
    if prepare is None:
        message = describe_missing_pod(prepare_job_name(job.ref.name))
        return Decision(Phase.PREPARING, Reason.PREPARING, message, Action.PREPARE)
    verdict = classify(prepare, startup_timeout(job), now)
    if verdict.stage is Stage.LOST:
        return Decision(Phase.PREPARING, Reason.PREPARING, verdict.message, Action.DELETE_ALL_JOBS)
    if verdict.stage is not Stage.ENDED:
        message = verdict.message or "model, dataset and output are being checked"
        return Decision(Phase.PREPARING, verdict.reason, message, requeue_at=verdict.requeue_at)
    prepared = verdict.termination_message.prepared if verdict.termination_message else None
    if verdict.reason not in PREPARE_SUCCESS_REASONS or prepared is None:
        return _prepare_again(job, prepare, verdict, now) or decide_failed(verdict)
    return _after_preparation(job, prepared, children.gpu_nodes, number)


def _prepare_again(job: Job, prepare: ChildJob, verdict: JobState, now: datetime) -> Decision | None:
    """Give what recovers by itself some time, and prepare again; it holds no GPU, and ends with deadlines.startup."""
    if REASONS[verdict.reason].retry is not RetryAction.RESUME or now >= job.created_at + startup_timeout(job):
        return None
    again = prepare.ended_at(now) + PREPARE_PAUSE
    message = f"{verdict.message}; preparation is retried"
    if now < again:
        return Decision(Phase.PREPARING, verdict.reason, message, requeue_at=again)
    return Decision(Phase.PREPARING, verdict.reason, message, Action.DELETE_ALL_JOBS)


def _after_preparation(job: Job, prepared: Prepared, gpu_nodes: tuple[Manifest, ...], number: int) -> Decision:
    if prepared.published is not None:
        message = f"the same result was published before as {prepared.published.adapter}"
        return Decision(
            Phase.SUCCEEDED, Reason.ALREADY_PUBLISHED, message, prepared=prepared, result=prepared.published
        )
    try:
        plan = _keep_plan(job, prepared, gpu_nodes)
    except DoesNotFitError as error:
        message = f"spec.model.uri: {prepared.model.architecture} {error}"
        return Decision(Phase.FAILED, Reason.DOES_NOT_FIT, message, prepared=prepared)
    if job.status.plan != plan or job.status.output is None:
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


def _keep_plan(job: Job, prepared: Prepared, gpu_nodes: tuple[Manifest, ...]) -> Plan:
    """Keep a plan on record, so that neither a newer operator nor other nodes change a run halfway."""
    output = job.status.output
    if job.status.plan is not None and output is not None and output.digest == prepared.digest:
        return job.status.plan
    return make_plan(job.spec, prepared, read_gpu_inventory(gpu_nodes, job.spec.resources))
