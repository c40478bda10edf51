"""Reconciles a run that has ended: whether it is to continue, what it left running, and its children after the ttl."""

import logging
from dataclasses import replace

from qlora_operator.cluster.interface import AdmissionDeniedError, Cluster
from qlora_operator.controller.children import ADMISSION_DENIED_RETRY, delete_jobs, running_jobs, with_denial
from qlora_operator.controller.requeue import requeue_delay
from qlora_operator.controller.result import (
    ReconcileRequest,
    ReconcileResult,
    account_gpu_time,
    warn_of_request_without_effect,
    write_if_changed,
    write_status,
)
from qlora_operator.lifecycle import is_uncertain, next_leftover, revive
from qlora_operator.lifecycle.retention import children_expire_at, job_expires_at, jobs_to_delete
from qlora_operator.lifecycle.retry_policy import AT_ONCE
from qlora_operator.lifecycle.retry_request import begin_retry, is_pending, is_settled, record_request
from qlora_operator.models import Decision, Job, Retention, earliest
from qlora_operator.resources import Installation
from qlora_operator.status import with_observed_generation
from qlora_operator.stored_job import ReadJob

_log = logging.getLogger(__name__)


async def reconcile_ended(
    request: ReconcileRequest, read: ReadJob, cluster: Cluster, installation: Installation, *, from_cache: bool
) -> ReconcileResult | None:
    """Reconcile a run that has ended, unless it is to continue; None: read the QLoRAJob live first.

    Somebody may ask for it, or have raised the limit that ended it.
    """
    raw, previous = request.raw, request.previous_status
    if not is_settled(previous, raw.retry_request):
        return None if from_cache else await answer_retry_request(request, cluster)
    if read.spec is not None and not read.skew.unreadable:
        job = Job(raw.ref, raw.uid, raw.generation, raw.created_at, read.spec, read.status, read.skew)
        if decision := revive(job, request.context.now):
            return None if from_cache else await revive_run(job, decision, request, cluster)
    return await reconcile_finished(request, cluster, installation.retention, from_cache=from_cache)


async def revive_run(job: Job, decision: Decision, request: ReconcileRequest, cluster: Cluster) -> ReconcileResult:
    """Delete the Jobs that a failed run left running, and let it continue."""
    children = await cluster.list_children(request.raw)
    denial = await delete_jobs(running_jobs(children), job.ref, cluster)
    decision = with_denial(decision, denial) if denial else decision
    return await write_status(request, decision, children, cluster)


async def answer_retry_request(request: ReconcileRequest, cluster: Cluster) -> ReconcileResult:
    """Record a request to retry a finished run; once it is recorded, start a failed run again.

    The Jobs are deleted before the status says so: after a crash in between, the rest of them is deleted.
    """
    raw, previous, now = request.raw, request.previous_status, request.context.now
    if not is_pending(previous, raw.retry_request):
        status = record_request(previous, raw.retry_request)
        await warn_of_request_without_effect(request, cluster)
        written = await write_if_changed(request, status, cluster)
        # An older CRD stores nothing of it, and repeating the write at once would not change that.
        return ReconcileResult(None if written == raw.resource_version else AT_ONCE, written, status)
    children = await cluster.list_children(raw)
    jobs = [child for child in children.jobs if not child.deleting]
    if denial := await delete_jobs(jobs, raw.ref, cluster):
        raise AdmissionDeniedError(denial, permanent=False)
    begun, decision = begin_retry(previous, now)
    begun_request = replace(request, previous_status=begun, read_status=previous)
    return await write_status(begun_request, decision, children, cluster)


async def reconcile_finished(
    request: ReconcileRequest, cluster: Cluster, retention: Retention, *, from_cache: bool
) -> ReconcileResult | None:
    """Clean up after a run; None: something is to be deleted, so read the QLoRAJob live first."""
    raw, previous, now = request.raw, request.previous_status, request.context.now
    expiries = (children_expire_at(raw.spec, previous, retention), job_expires_at(previous, retention))
    expired, job_expired = (moment is not None and moment <= now for moment in expiries)
    clean = previous.children_deleted_at is not None or not expired
    children = cluster.children_from_cache(raw)
    done = clean and not jobs_to_delete(children, previous, now, expired=expired)
    uncertain = is_uncertain(previous, children, now)
    if from_cache and (job_expired or not done or uncertain):
        return None
    if job_expired:
        await cluster.delete_qlorajob(raw)
        return ReconcileResult(gone=True)
    denial = "" if done else await delete_children(request, cluster, expired=expired)
    if uncertain:
        children = await cluster.list_children(raw)
    status = account_gpu_time(request, with_observed_generation(previous, raw.generation), children)
    if not (clean or denial):
        status = status.model_copy(update={"children_deleted_at": now})
    requeue_at = earliest(now, *expiries, next_leftover(previous, children, now))
    written = await write_if_changed(request, status, cluster)
    retry_after = ADMISSION_DENIED_RETRY if denial else None
    delay = requeue_delay(now, requeue_at, retry_after, progressed=written is not None)
    return ReconcileResult(delay, written, status, request)


async def delete_children(request: ReconcileRequest, cluster: Cluster, *, expired: bool) -> str:
    """Delete the Jobs that outlive the run, and after expiry all Jobs with their pods, ConfigMaps and Services.

    Returns:
        What was denied, or nothing.

    """
    raw, status, now = request.raw, request.previous_status, request.context.now
    jobs = jobs_to_delete(await cluster.list_children(raw), status, now, expired=expired)
    denial = await delete_jobs(jobs, raw.ref, cluster)
    if denial:
        _log.warning("the Jobs of %s, which has ended, are not deleted: %s", "/".join(raw.ref), denial)
    elif expired:
        await cluster.delete_configuration(raw)
    return denial
