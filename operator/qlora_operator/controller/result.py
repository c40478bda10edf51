"""Input and outcome of one reconcile, and how its status is written."""

import logging
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from qlora_api.names import Phase
from qlora_api.v1alpha1 import QLoRAJobStatus
from qlora_operator.cluster.interface import Cluster, InvalidStatusError
from qlora_operator.controller.requeue import requeue_delay
from qlora_operator.lifecycle import ReconcileContext, account
from qlora_operator.lifecycle.leftovers import END_GRACE
from qlora_operator.lifecycle.retry_policy import AT_ONCE
from qlora_operator.lifecycle.retry_request import describe_no_effect, is_recorded, note_request
from qlora_operator.models import Decision, Observation, RawJob
from qlora_operator.resources import Owner, build_event
from qlora_operator.status import derive_alternatives, to_wire, without_refused_reasons
from qlora_operator.stored_job import keep_unknown

_log = logging.getLogger(__name__)

CLEAN_UP_AFTER: Final = {Phase.FAILED: AT_ONCE, Phase.SUCCEEDED: END_GRACE}
"""When a run that is over is reconciled again, to release what it holds."""


@dataclass(frozen=True)
class ReconcileRequest:
    """The input of one reconcile: the QLoRAJob, its status so far, the time and the last progress report."""

    raw: RawJob
    previous_status: QLoRAJobStatus
    context: ReconcileContext
    read_status: QLoRAJobStatus | None = None
    """The status as it was read, if previous_status was changed since."""


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
    """The input of the reconcile; None if it only recorded a request to retry."""
    belongs_to: str = ""
    """The other installation that the QLoRAJob belongs to, so that nothing was done."""
    gone: bool = False
    """Whether the QLoRAJob does not exist."""


def account_gpu_time(request: ReconcileRequest, status: QLoRAJobStatus, children: Observation | None) -> QLoRAJobStatus:
    """Return a new status with the GPU time that the pods held since the last one."""
    if children is None:
        return status
    context = request.context
    return account(
        request.previous_status,
        status,
        children,
        context.last_report,
        watched=context.reports_since is not None and context.node_failures_known,
        now=context.now,
        prices=context.prices,
    )


async def write_if_changed(request: ReconcileRequest, status: QLoRAJobStatus, cluster: Cluster) -> str | None:
    """Write a status that changed, with what another version stored in it, or without that if the CRD refuses it.

    Returns:
        The new resourceVersion; None if the status is the one that was read.

    """
    if status == request.previous_status:
        return None
    raw, wire = request.raw, to_wire(status)
    merged = keep_unknown(raw.status, to_wire(request.read_status or request.previous_status), wire)
    try:
        return await cluster.write_status(raw, merged)
    except InvalidStatusError:
        if merged == wire:
            raise
    return await cluster.write_status(raw, wire)


async def warn_of_request_without_effect(request: ReconcileRequest, cluster: Cluster) -> None:
    """Record an Event for a new request to retry a run that has not failed; a new run has none to refer to."""
    raw, status = request.raw, request.previous_status
    if is_recorded(status, raw.retry_request) or status.phase in {None, Phase.FAILED}:
        return
    described = status.model_copy(update={"message": describe_no_effect(status)})
    event = build_event(Owner(raw.ref, raw.uid), f"{raw.resource_version}/retry", described, request.context.now)
    await cluster.record_event(event)


async def write_status(
    request: ReconcileRequest, decision: Decision, children: Observation | None, cluster: Cluster
) -> ReconcileResult:
    """Record an Event for a transition, and write the status if it changed; less of it if that is refused.

    Without the children, GPUs and their time stay as they are.
    """
    raw, previous = request.raw, request.previous_status
    report, now = request.context.last_report, request.context.now
    gpus = previous.gpus or 0
    await warn_of_request_without_effect(request, cluster)
    claimed = {"operator": request.context.claimant.installation or None}
    statuses = (
        note_request(account_gpu_time(request, status, children), raw.retry_request).model_copy(update=claimed)
        for status in derive_alternatives(previous, decision, report, gpus=gpus, generation=raw.generation, now=now)
    )
    status = next(statuses)
    if (status.phase, status.reason) != (previous.phase, previous.reason):
        await cluster.record_event(build_event(Owner(raw.ref, raw.uid), raw.resource_version, status, now))
    while True:
        try:
            written = await write_if_changed(request, status, cluster)
        except InvalidStatusError as error:
            less = without_refused_reasons(status, str(error)) or next(statuses, None)
            if less is None:
                raise
            _log.error("the status of %s was refused, so less of it is written: %s", "/".join(raw.ref), error)
            status = less
        else:
            after = CLEAN_UP_AFTER.get(decision.phase, decision.requeue_after)
            delay = requeue_delay(now, decision.requeue_at, after, progressed=written is not None)
            return ReconcileResult(delay, written, status, request)
