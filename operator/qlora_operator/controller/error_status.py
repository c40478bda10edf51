"""Writes an error that ended a reconcile into the status of its QLoRAJob, so that no retry is silent.

It works on the status as it is stored: what cannot be read may be the error.
"""

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final

from qlora_api.escapes import escape_line
from qlora_api.job_ref import JobRef
from qlora_api.names import TERMINAL, ConditionType, Phase
from qlora_api.reasons import Reason
from qlora_operator.cluster.interface import Cluster
from qlora_operator.lifecycle import ReconcileContext
from qlora_operator.models import Manifest, RawJob

MAX_ERROR: Final = 512
"""Longest text of an error in a status."""


async def write_error(ref: JobRef, error: Exception, cluster: Cluster, context: ReconcileContext) -> str | None:
    """Write the error unless the status says it already; return the new resourceVersion, or None."""
    raw = await cluster.read_job(ref)
    if raw is None or raw.deleting or context.claimant.find_other(raw.status.get("operator")):
        return None
    status = with_error(raw, describe_error(error), context.now)
    return await cluster.write_status(raw, status) if status != raw.status else None


def describe_error(error: Exception) -> str:
    """Return what the status says of an error."""
    text = escape_line(f"{type(error).__name__}: {error}")[:MAX_ERROR]
    return f"the operator fails to reconcile this run, and retries: {text}"


def with_error(raw: RawJob, message: str, now: datetime) -> Manifest:
    """Return the stored status with the error in the condition Reconciling, and in the message of a run under way.

    Phase and reason stay: the error says nothing of the run. The next reconcile that succeeds replaces both texts.
    """
    status: Manifest = {
        "observedGeneration": -1,
        "phase": Phase.PENDING.value,
        "reason": Reason.ACCEPTED.value,
        **raw.status,
    }
    finished = status["phase"] in TERMINAL
    if not finished:
        status["message"] = message
    stored = [entry for entry in status.get("conditions", ()) if isinstance(entry, Mapping)]
    conditions = [entry for entry in stored if entry.get("type") != ConditionType.RECONCILING]
    former: Mapping[str, Any] = next((entry for entry in stored if entry not in conditions), {})
    reconciling = _reconciling(former, "False" if finished else "True", now)
    reconciling |= {"reason": status["reason"], "message": message, "observedGeneration": raw.generation}
    return {**status, "conditions": [*conditions, reconciling]}


def _reconciling(stored: Mapping[str, Any], status: str, now: datetime) -> Manifest:
    since = stored.get("lastTransitionTime") if stored.get("status") == status else None
    written = now.replace(microsecond=0).isoformat().replace("+00:00", "Z")
    return {"type": ConditionType.RECONCILING.value, "status": status, "lastTransitionTime": since or written}
