"""Reconciles one QLoRAJob: read it, list its children, decide, apply the decision, write the status once."""

import logging
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Final

from qlora_api.accelerators import accelerator_of_resource
from qlora_api.job_ref import JobRef
from qlora_api.names import Phase, Role, train_job_name
from qlora_api.reasons import Reason
from qlora_api.v1alpha1 import QLoRAJobStatus
from qlora_operator.cluster.interface import AdmissionDeniedError, Cluster
from qlora_operator.controller.children import (
    ADMISSION_DENIED_RETRY,
    apply_decision,
    delete_jobs,
    limit_jobs,
    missing_queue_labels,
    outdated_deadlines,
    outdated_prepare_jobs,
    restore_jobs,
    running_jobs,
)
from qlora_operator.controller.finished import reconcile_ended
from qlora_operator.controller.queued_placement import refresh_avoided_nodes
from qlora_operator.controller.result import (
    ReconcileRequest,
    ReconcileResult,
    account_gpu_time,
    write_if_changed,
    write_status,
)
from qlora_operator.controller.run_config import refresh_run_config
from qlora_operator.controller.run_settings import RunSettings, read_settings
from qlora_operator.lifecycle import (
    ReconcileContext,
    decide,
    is_terminal,
    is_uncertain,
    is_under_way,
    keep_as_it_is,
    leftover_jobs,
    needs_gpu_nodes,
    rejected,
    retry_limits,
    unexplained_jobs,
    vanished_attempt,
)
from qlora_operator.lifecycle.class_choice import depends_on_class, end_wait, wait_for_class, without_wait
from qlora_operator.lifecycle.queue import queued_jobs
from qlora_operator.lifecycle.retry_policy import AT_ONCE
from qlora_operator.lifecycle.volume_wait import waits_for_volumes
from qlora_operator.models import Action, ChildJob, Decision, Job, Observation, RawJob
from qlora_operator.resources import Installation
from qlora_operator.stored_job import ReadJob, read_job
from qlora_planner.validation import Violation

_log = logging.getLogger(__name__)

NO_POD_EVENT: Final = "FailedCreate"
"""Reason of the Event of the Job controller for a pod that the API server refused."""
SUSPENDED_EVENT: Final = "Stopped"
"""Reason of the Event of Kueue for a Job that it has suspended."""
EVENT_LEAD: Final = timedelta(seconds=15)
"""By how much an Event may be earlier than the Job controller's note in the Job of what it is about."""


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
        return ReconcileResult(gone=True)
    return await reconcile_once(raw, cluster, installation, context, from_cache=False) or ReconcileResult()


async def reconcile_once(
    raw: RawJob, cluster: Cluster, installation: Installation, context: ReconcileContext, *, from_cache: bool
) -> ReconcileResult | None:
    """Reconcile a QLoRAJob once, unless it belongs to another installation; None: read it live first."""
    claimant, claimed_by = context.claimant, raw.status.get("operator")
    if other := claimant.find_other(claimed_by):
        return ReconcileResult(belongs_to=other)
    read = read_job(raw)
    stored = read.status
    if claimed_by is not None and claimed_by != claimant.installation:
        read = read._replace(status=without_reports(stored))
    request = ReconcileRequest(raw, read.status, without_stale_report(context, raw), stored)
    if raw.deleting:
        return await stop_deleted(request, cluster)
    if is_terminal(read.status):
        return await reconcile_ended(request, read, cluster, installation, from_cache=from_cache)
    if claimant.must_claim(claimed_by):
        return await claim(request, cluster)
    return await reconcile_unfinished(request, read, cluster, installation, from_cache=from_cache)


async def stop_deleted(request: ReconcileRequest, cluster: Cluster) -> ReconcileResult:
    """Delete the Jobs of a QLoRAJob that is being deleted: a finalizer may keep it, and with it its children.

    Whoever set the finalizer may read from the status what the run has held.
    """
    raw = request.raw
    children = await cluster.list_children(raw)
    denial = await delete_jobs(running_jobs(children), raw.ref, cluster)
    if denial:
        _log.warning("%s is being deleted, and its Jobs run on: %s", raw.ref, denial)
    written = await write_if_changed(request, account_gpu_time(request, request.previous_status, children), cluster)
    return ReconcileResult(ADMISSION_DENIED_RETRY if denial else None, written)


async def reconcile_unfinished(
    request: ReconcileRequest, read: ReadJob, cluster: Cluster, installation: Installation, *, from_cache: bool
) -> ReconcileResult | None:
    """Reconcile a run that has not ended; None: the cached copy is not enough to act on, read it live."""
    raw, spec = request.raw, read.spec
    if spec is None:
        return None if from_cache else await reconcile_unreadable(request, read, cluster)
    job = Job(raw.ref, raw.uid, raw.generation, raw.created_at, spec, read.status, read.skew)
    children = cluster.children_from_cache(raw)
    now = request.context.now
    settings = await read_settings(job, children, cluster, installation, request.context)
    decision = decide_next(settings, children)
    # A queue is asked when its time has come, not after each event.
    asks_queue = not from_cache and bool(queued_jobs(children))
    cache_is_enough = (is_noop(decision, settings.job, children, now) and not asks_queue) or (
        is_first_step(decision, job) and not (from_cache and children.jobs)
    )
    if from_cache and not cache_is_enough:
        return None
    if not cache_is_enough:
        children = await list_restored(job, raw, cluster, now)
        settings = await read_settings(job, children, cluster, installation, request.context)
        decision = decide_next(settings, children)
    job, installation = settings.job, settings.installation
    decision, created = await apply_decision(decision, job, children, cluster, installation, now)
    if decision.phase is Phase.FAILED:
        decision = replace(decision, retry_limits=retry_limits(job))
    if created and is_first_step(decision, job):
        return ReconcileResult(AT_ONCE)  # status comes after the first steps of all queued QLoRAJobs
    decision = await limit_jobs(decision, job, children, cluster, now)
    await refresh_avoided_nodes(job, children, cluster, request.context)
    report = request.context.last_report
    decision = await refresh_run_config(decision, job, children, cluster, installation, report, now)
    return await write_status(request, decision, children, cluster)


def decide_next(settings: RunSettings, children: Observation) -> Decision:
    """Return the next decision; one that needs a class waits until that can be used."""
    decision = decide(without_wait(settings.job), children, settings.context)
    if settings.problem and depends_on_class(decision):
        return wait_for_class(settings.job, settings.problem, settings.context.now)
    return replace(end_wait(decision, settings.job), used_class=settings.used_class)


def without_reports(status: QLoRAJobStatus) -> QLoRAJobStatus:
    """Drop the last report, which another installation received: the pod reports to that one, and not to this."""
    return status.model_copy(update={"last_report": None})


async def claim(request: ReconcileRequest, cluster: Cluster) -> ReconcileResult:
    """Record which installation reconciles the run; of two that try, the API server refuses the second one."""
    previous = request.previous_status
    decision = Decision(
        previous.phase or Phase.PENDING,
        previous.reason or Reason.ACCEPTED,
        previous.message or "",
        requeue_after=AT_ONCE,
    )
    return await write_status(request, decision, None, cluster)


def is_first_step(decision: Decision, job: Job) -> bool:
    """Return whether a decision is the first step of a run; it is idempotent, since names of children are derived."""
    step = decision.action in {Action.PREPARE, Action.NONE} and decision.phase is Phase.PREPARING
    return step and job.status.phase is None


def is_noop(decision: Decision, job: Job, children: Observation, now: datetime) -> bool:
    """Return whether a decision changes and records nothing, so that a stale cache can do no harm."""
    ended = decision.attempt and decision.attempt.reason
    facts = (decision.plan, decision.prepared, decision.result, decision.checkpoint, ended)
    # The deadline of a preparation depends on its own pod only, and a newer view corrects it.
    training = replace(children, jobs=tuple(child for child in children.jobs if child.role is Role.TRAIN))
    to_do = (
        outdated_deadlines(decision, job, training, now),
        missing_queue_labels(job, children),
        outdated_prepare_jobs(job, children),
        leftover_jobs(job.status, children, now),
        unexplained_jobs(job, children, now),
        is_uncertain(job.status, children, now),
        decision.attempt and waits_for_volumes(children.train(decision.attempt.number), now),
    )
    return (
        decision.action is Action.NONE
        and (decision.phase, decision.reason) == (job.status.phase, job.status.reason)
        and not any(facts)
        and decision.preparation in (None, job.status.preparation)
        and not any(to_do)
    )


async def list_restored(job: Job, raw: RawJob, cluster: Cluster, now: datetime) -> Observation:
    """List the children; a Job that its labels or its owner do not show gets them again, and is listed then.

    Raises:
        AdmissionDeniedError: What the operator restores is refused, or removed again.

    """
    children = await list_children_and_gpu_nodes(job, raw, cluster, now)
    if not await restore_jobs(job, children, cluster):
        return children
    children = await list_children_and_gpu_nodes(job, raw, cluster, now)
    if number := vanished_attempt(job.status, children):
        message = f"something removes the labels or the owner of the Job {train_job_name(raw.ref.name, number)}"
        raise AdmissionDeniedError(f"{message}, by which its run is followed; change the policy", permanent=False)
    return children


async def list_children_and_gpu_nodes(job: Job, raw: RawJob, cluster: Cluster, now: datetime) -> Observation:
    """List the children live, the GPU nodes if a plan depends on them, and Events of a Job that has no pod."""
    children = await cluster.list_children(raw)
    if needs_gpu_nodes(job, children):
        accelerator = accelerator_of_resource(job.spec.resources.gpu_resource)
        children = replace(children, gpu_nodes=await cluster.find_gpu_nodes(accelerator))
    unexplained = unexplained_jobs(job, children, now)
    queued = queued_jobs(children)
    jobs = [
        await with_event_message(child, raw.ref, cluster, looked_up=child.name in unexplained)
        for child in children.jobs
    ]
    jobs = [await with_workload(child, raw.ref, cluster) if child.name in queued else child for child in jobs]
    return replace(children, jobs=tuple(jobs))


async def with_workload(child: ChildJob, ref: JobRef, cluster: Cluster) -> ChildJob:
    """Return a Job with what its queue says."""
    return replace(child, workload=await cluster.find_workload(ref, child.uid))


async def with_event_message(child: ChildJob, ref: JobRef, cluster: Cluster, *, looked_up: bool) -> ChildJob:
    """Return a Job with the message of the Event that says why it has no pod, or why it was suspended."""
    if not looked_up:
        return child
    reasons = {SUSPENDED_EVENT} if child.suspended else {NO_POD_EVENT}
    since = (child.started_at or child.suspended_at or child.created_at) - EVENT_LEAD
    return replace(child, event_message=await cluster.find_event(ref, child.uid, reasons, since))


def without_stale_report(context: ReconcileContext, raw: RawJob) -> ReconcileContext:
    """Drop a report that belongs to a deleted QLoRAJob with the same name."""
    report = context.last_report
    stale = report and (report.updated_at < raw.created_at or context.report_job_uid not in {None, raw.uid})
    return replace(context, last_report=None) if stale else context


async def reconcile_unreadable(request: ReconcileRequest, read: ReadJob, cluster: Cluster) -> ReconcileResult:
    """Leave a run alone whose spec lacks a field that this version requires; refuse it if it is not under way."""
    keeps = read.skew.unknown_words or is_under_way(read.status, read.skew, await cluster.list_children(request.raw))
    violation = Violation(Reason.INVALID_SPEC, read.skew.invalid)
    decision = keep_as_it_is(read.status, read.skew) if keeps else rejected((violation,))
    return await write_status(request, decision, None, cluster)
