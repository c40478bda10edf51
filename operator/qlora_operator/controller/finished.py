"""Reconciles a run that has ended: what it left running, its children after the ttl, and at last the QLoRAJob."""

from qlora_operator.cluster.interface import Cluster
from qlora_operator.controller.requeue import requeue_delay
from qlora_operator.controller.result import ReconcileRequest, ReconcileResult, account_gpu_time, write_if_changed
from qlora_operator.lifecycle import is_uncertain
from qlora_operator.lifecycle.leftovers import next_leftover
from qlora_operator.lifecycle.retention import children_expire_at, job_expires_at, jobs_to_delete
from qlora_operator.models import Retention, earliest
from qlora_operator.status import with_observed_generation


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
    if not done:
        await delete_children(request, cluster, expired=expired)
    if uncertain:
        children = await cluster.list_children(raw)
    status = account_gpu_time(request, with_observed_generation(previous, raw.generation), children)
    if not clean:
        status = status.model_copy(update={"children_deleted_at": now})
    requeue_at = earliest(now, *expiries, next_leftover(previous, children, now))
    written = await write_if_changed(request, status, cluster)
    delay = requeue_delay(now, requeue_at, None, progressed=written is not None)
    return ReconcileResult(delay, written, status, request)


async def delete_children(request: ReconcileRequest, cluster: Cluster, *, expired: bool) -> None:
    """Delete the Jobs that outlive the run; after expiry all Jobs with their pods, ConfigMaps and Services."""
    raw, status, now = request.raw, request.previous_status, request.context.now
    for child in jobs_to_delete(await cluster.list_children(raw), status, now, expired=expired):
        await cluster.delete_job(raw.ref, child)
    if expired:
        await cluster.delete_configuration(raw)
