"""Input and outcome of one reconcile, and how its status is written."""

from dataclasses import dataclass
from datetime import timedelta

from qlora_api.v1alpha1 import QLoRAJobStatus
from qlora_operator.cluster.interface import Cluster, InvalidStatusError
from qlora_operator.lifecycle import ReconcileContext, account
from qlora_operator.models import Observation, RawJob
from qlora_operator.status import to_wire
from qlora_operator.stored_job import keep_unknown


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
