"""Reconciles one QLoRAJob: read it, list its children, decide, apply the decision, write the status once."""

import logging
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final

from pydantic import ValidationError

from qlora_api.job_ref import JobRef
from qlora_api.names import Phase, Role
from qlora_api.reasons import Reason
from qlora_api.v1alpha1 import QLoRAJobSpec, QLoRAJobStatus, to_timedelta
from qlora_operator.cluster.interface import AdmissionDeniedError, Cluster, InvalidStatusError, NameConflictError
from qlora_operator.lifecycle import (
    ReconcileContext,
    avoided_nodes,
    decide,
    is_terminal,
    needs_gpu_nodes,
    rejected,
    reported_checkpoint,
    time_left,
)
from qlora_operator.lifecycle.retry_policy import AT_ONCE, LONGEST_WAIT
from qlora_operator.models import Action, AttemptInputs, Decision, Job, Manifest, Observation, RawJob
from qlora_operator.resources import (
    Installation,
    Owner,
    build_deadline,
    build_event,
    build_prepare_config,
    build_prepare_job,
    build_run_config,
    build_service,
    build_train_job,
)
from qlora_operator.status import derive_alternatives, to_wire, with_observed_generation
from qlora_planner.validation import Violation

_log = logging.getLogger(__name__)

ADMISSION_DENIED_RETRY: Final = timedelta(minutes=1)
"""People have to change quotas and policies, so retrying sooner gains nothing."""
NAME_CONFLICT_RETRY: Final = timedelta(seconds=5)
"""The garbage collector needs a few seconds to delete the children of a deleted QLoRAJob."""


@dataclass(frozen=True)
class ReconcileRequest:
    """The input of one reconcile: the QLoRAJob, its status so far, the time and the last progress report."""

    raw: RawJob
    previous_status: QLoRAJobStatus
    context: ReconcileContext


@dataclass(frozen=True)
class ReconcileResult:
    """The outcome of one reconcile, as in controller-runtime."""

    requeue_after: timedelta | None = None
    """Delay until the next reconcile, if one is needed without an event."""
    written_version: str | None = None
    """The resourceVersion of the status, if one was written."""
    status: QLoRAJobStatus | None = None
    """The current status; None if the QLoRAJob is gone, or its first step is taken but not yet written."""
    request: ReconcileRequest | None = None
    """The input of the reconcile; None if the run had already ended."""


async def reconcile(
    ref: JobRef, cluster: Cluster, installation: Installation, context: ReconcileContext, cached: RawJob | None = None
) -> ReconcileResult:
    """Bring the cluster to the spec, and write the status.

    The cached copy of the QLoRAJob may be stale. It is enough for the first step, which is idempotent, and to see that
    there is nothing to do; for anything else the QLoRAJob is read live (docs/decisions/0010-late-views.md).
    """
    if cached is not None:
        result = await reconcile_once(cached, cluster, installation, context, from_cache=True)
        if result is not None:
            return result
    raw = await cluster.read_job(ref)
    if raw is None:
        return ReconcileResult()
    return await reconcile_once(raw, cluster, installation, context, from_cache=False) or ReconcileResult()


async def reconcile_once(
    raw: RawJob, cluster: Cluster, installation: Installation, context: ReconcileContext, *, from_cache: bool
) -> ReconcileResult | None:
    """Reconcile a QLoRAJob once; None: the cached copy is not enough to act on, read it live."""
    if raw.deleting:
        return ReconcileResult()
    request = ReconcileRequest(raw, QLoRAJobStatus.model_validate(raw.status), without_stale_report(context, raw))
    if is_terminal(request.previous_status):
        return await reconcile_finished(request, cluster)
    spec = parse(raw)
    if isinstance(spec, Violation):
        return None if from_cache else await write_status(request, rejected((spec,)), None, cluster)
    job = Job(raw.ref, raw.uid, raw.generation, raw.created_at, spec, request.previous_status)
    children = cluster.children_from_cache(raw)
    decision = decide(job, children, request.context)
    cache_is_enough = is_noop(decision, job, children) or (
        is_first_step(decision, job) and not (from_cache and children.jobs)
    )
    if from_cache and not cache_is_enough:
        return None
    if not cache_is_enough:
        children = await list_children_and_gpu_nodes(job, raw, cluster)
        decision = decide(job, children, request.context)
    decision, created = await apply_decision(decision, job, children, cluster, installation)
    if created and is_first_step(decision, job):
        return ReconcileResult(AT_ONCE)  # status comes after the first steps of all queued QLoRAJobs
    return await write_status(request, decision, spec.resources.nodes * spec.resources.gpus_per_node, cluster)


def is_first_step(decision: Decision, job: Job) -> bool:
    """Return whether a decision is the first step of a run; it is idempotent, since names of children are derived."""
    step = decision.action in {Action.PREPARE, Action.NONE} and decision.phase is Phase.PREPARING
    return step and job.status.phase is None


def is_noop(decision: Decision, job: Job, children: Observation) -> bool:
    """Return whether a decision changes and records nothing, so that a stale cache can do no harm."""
    facts = (decision.plan, decision.prepared, decision.result, decision.attempt and decision.attempt.reason)
    return (
        decision.action is Action.NONE
        and (decision.phase, decision.reason) == (job.status.phase, job.status.reason)
        and not any(facts)
        and not outdated_deadlines(job, children)
    )


async def list_children_and_gpu_nodes(job: Job, raw: RawJob, cluster: Cluster) -> Observation:
    """List the children live, and the GPU nodes if a plan depends on them."""
    children = await cluster.list_children(raw)
    return replace(children, gpu_nodes=await cluster.find_gpu_nodes()) if needs_gpu_nodes(job, children) else children


def without_stale_report(context: ReconcileContext, raw: RawJob) -> ReconcileContext:
    """Drop a report that belongs to a deleted QLoRAJob with the same name."""
    report = context.last_report
    stale = report and (report.updated_at < raw.created_at or context.report_job_uid not in {None, raw.uid})
    return replace(context, last_report=None) if stale else context


def parse(raw: RawJob) -> QLoRAJobSpec | Violation:
    """Parse the spec, or return which field is invalid and why."""
    try:
        return QLoRAJobSpec.model_validate(raw.spec)
    except ValidationError as error:
        sentences = (f"{'.'.join(('spec', *map(str, entry['loc'])))}: {entry['msg']}" for entry in error.errors())
        return Violation(Reason.INVALID_SPEC, "; ".join(sentences))


async def reconcile_finished(request: ReconcileRequest, cluster: Cluster) -> ReconcileResult:
    """Clean up after a run: delete Jobs that a failed run left running, and all Jobs once spec.ttl has expired."""
    raw, previous, now = request.raw, request.previous_status, request.context.now
    expires = expires_at(raw, previous)
    expired = expires is not None and now >= expires
    if jobs_to_delete(cluster.children_from_cache(raw), previous, expired=expired):
        for name in jobs_to_delete(await cluster.list_children(raw), previous, expired=expired):
            await cluster.delete_job(raw.ref, name)
    status = with_observed_generation(previous, raw.generation)
    wait = expires - now if expires is not None and not expired else None
    return ReconcileResult(wait, await _write_if_changed(raw, previous, status, cluster), status)


def expires_at(raw: RawJob, status: QLoRAJobStatus) -> datetime | None:
    """Return when the children of a finished run are deleted; None if the spec has no ttl or is invalid."""
    spec = parse(raw)
    if isinstance(spec, Violation) or spec.ttl is None or status.finished_at is None:
        return None
    return status.finished_at + min(to_timedelta(spec.ttl), LONGEST_WAIT)


def jobs_to_delete(children: Observation, status: QLoRAJobStatus, *, expired: bool) -> list[str]:
    """Return the Jobs of a finished run to delete: all after expiry, before that what a failed run left running."""
    failed = status.phase is Phase.FAILED
    return [
        child.name for child in children.jobs if (expired or (failed and child.holds_resources)) and not child.deleting
    ]


async def apply_decision(
    decision: Decision, job: Job, children: Observation, cluster: Cluster, installation: Installation
) -> tuple[Decision, bool]:
    """Apply a decision to the children; return it, or its replacement if a child is refused, and if any was created."""
    created = False
    try:
        for child in build_children(decision, job, installation):
            created |= await cluster.ensure(child)
    except NameConflictError as error:
        return on_name_conflict(error), created
    except AdmissionDeniedError as error:
        return on_admission_denied(error), created
    if decision.action is Action.DELETE_ALL_JOBS:
        await delete_all_jobs(job, children, cluster)
    if decision.action is Action.DELETE_RUNNING_JOBS:
        await delete_running_jobs(job, children, cluster)
    if decision.action is Action.DELETE_PREPARE_JOB and children.prepare is not None and not children.prepare.deleting:
        await cluster.delete_job(job.ref, children.prepare.name)
    if decision.action is Action.NONE:
        for deadline in outdated_deadlines(job, children):
            await cluster.patch(deadline)
    return decision, created


def build_children(decision: Decision, job: Job, installation: Installation) -> tuple[Manifest, ...]:
    """Return the children to create, the ConfigMap first, because the pod mounts it."""
    owner = Owner(job.ref, job.uid)
    if decision.action is Action.PREPARE:
        return (
            build_prepare_config(owner, job.spec, installation),
            build_prepare_job(owner, job.spec, installation),
        )
    if decision.action is Action.TRAIN and decision.plan and decision.prepared and decision.attempt:
        run = AttemptInputs(
            decision.attempt.number,
            decision.plan,
            decision.prepared,
            seconds_left=seconds_left(job),
            avoided_nodes=avoided_nodes(job.status.attempts),
            checkpoint=reported_checkpoint(job.status, decision.attempt.number),
        )
        return (
            build_run_config(owner, job.spec, run, installation),
            *([build_service(owner, run.attempt)] if run.plan.nodes > 1 else []),
            build_train_job(owner, job.spec, run, installation),
        )
    return ()


def on_name_conflict(error: NameConflictError) -> Decision:
    """Wait for the child of an earlier QLoRAJob to be deleted; fail if the name belongs to something else."""
    if error.being_deleted:
        return Decision(Phase.PENDING, Reason.ACCEPTED, str(error), requeue_after=NAME_CONFLICT_RETRY)
    return Decision(Phase.FAILED, Reason.INVALID_SPEC, str(error))


def on_admission_denied(error: AdmissionDeniedError) -> Decision:
    """Fail if the child can never be created; wait if a quota or a policy may change."""
    if error.permanent:
        return Decision(Phase.FAILED, Reason.INVALID_SPEC, str(error))
    return Decision(Phase.PENDING, Reason.POD_REJECTED, str(error), requeue_after=ADMISSION_DENIED_RETRY)


async def delete_running_jobs(job: Job, children: Observation, cluster: Cluster) -> None:
    """Delete the Jobs that still run; their pods get the grace period to write a checkpoint.

    A Job whose pods have ended is kept, even if it is not marked as finished yet: it may hold the result of prepare.
    """
    for child in children.jobs:
        if child.holds_resources and not child.deleting:
            await cluster.delete_job(job.ref, child.name)


async def delete_all_jobs(job: Job, children: Observation, cluster: Cluster) -> None:
    """Delete every child Job, prepare first: after a crash in between, the remaining training Job shows why."""
    for child in sorted(children.jobs, key=lambda child: child.attempt):
        if not child.deleting:
            await cluster.delete_job(job.ref, child.name)


def outdated_deadlines(job: Job, children: Observation) -> list[Manifest]:
    """Return the patches that running training Jobs need after a change of spec.deadlines.total."""
    seconds = seconds_left(job)
    return [
        build_deadline(job.ref, child.name, seconds)
        for child in children.jobs
        if child.role is Role.TRAIN and not (child.finished or child.deleting) and child.deadline_seconds != seconds
    ]


def seconds_left(job: Job) -> int:
    """Return the seconds of spec.deadlines.total left for the current attempt; Kubernetes requires at least 1."""
    ended = [attempt for attempt in job.status.attempts if attempt.reason]
    return max(int(time_left(job.spec.deadlines, ended).total_seconds()), 1)


async def write_status(
    request: ReconcileRequest, decision: Decision, gpus: int | None, cluster: Cluster
) -> ReconcileResult:
    """Record an Event for a transition, and write the status if it changed; less of it if that is refused."""
    raw, previous = request.raw, request.previous_status
    report, now = request.context.last_report, request.context.now
    statuses = derive_alternatives(previous, decision, report, gpus=gpus, generation=raw.generation, now=now)
    status = next(statuses)
    if (status.phase, status.reason) != (previous.phase, previous.reason):
        await cluster.record_event(build_event(Owner(raw.ref, raw.uid), raw.resource_version, status, now))
    while True:
        try:
            written = await _write_if_changed(raw, previous, status, cluster)
        except InvalidStatusError as error:
            less = next(statuses, None)
            if less is None:
                raise
            _log.error("the status of %s was refused, so less of it is written: %s", "/".join(raw.ref), error)
            status = less
        else:
            return ReconcileResult(_requeue_after(decision, now), written, status, request)


def _requeue_after(decision: Decision, now: datetime) -> timedelta | None:
    """Return when to reconcile again; a failed run is reconciled at once, to release what it holds."""
    if decision.phase is Phase.FAILED:
        return timedelta(0)
    if decision.requeue_at is not None:
        return max(decision.requeue_at - now, timedelta(0))
    return decision.requeue_after


async def _write_if_changed(
    raw: RawJob, previous: QLoRAJobStatus, status: QLoRAJobStatus, cluster: Cluster
) -> str | None:
    return await cluster.write_status(raw, to_wire(status)) if status != previous else None
