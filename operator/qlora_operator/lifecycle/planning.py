"""Plans a prepared run; a refusal that depends on the nodes of the moment is final only if it lasts for a while."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final

from qlora_api.names import Phase
from qlora_api.prepared import Prepared
from qlora_api.reasons import Reason
from qlora_api.v1alpha1 import Plan, Preparation
from qlora_operator.lifecycle.prepare_retries import FIRST_PAUSE, LONGEST_PAUSE, PATIENCE, absence, format_until
from qlora_operator.models import Decision, Job, Manifest
from qlora_planner import make_plan
from qlora_planner.gpu_inventory import find_unusable_nodes, read_gpu_inventory
from qlora_planner.models.shapes import MismatchError
from qlora_planner.sizing import DoesNotFitError

LISTING_PATIENCE: Final = timedelta(minutes=2)
"""How long a refusal to list nodes is not believed: an upgrade that replaces the operator's ClusterRole takes seconds,
and an installation that never may list them delays each run by this."""
WAITING_FOR_NODES: Final = frozenset({Reason.PREPARING, Reason.DOES_NOT_FIT})
"""Reasons of a recorded preparation that has succeeded and waits for its plan."""
_NOT_LISTED: Final = "peak memory is not estimated: the operator may not list nodes"


def plan_run(
    job: Job, prepared: Prepared, gpu_nodes: Sequence[Manifest] | None, current: Preparation, now: datetime
) -> Plan | Decision:
    """Return the plan of a run, or the decision to wait for other nodes or to refuse the run.

    A recorded plan stays, so that neither an upgrade nor new nodes change a run halfway.

    Args:
        job: The run.
        prepared: What its preparation found.
        gpu_nodes: The nodes with GPUs; None if the operator was not allowed to list them.
        current: Its preparation, as it is recorded.
        now: The time.

    """
    output = job.status.output
    if job.status.plan is not None and output is not None and output.digest == prepared.digest:
        return job.status.plan
    if gpu_nodes is None:
        message = "the operator may not list nodes, so the run is not planned; grant it list on nodes (ClusterRole)"
        if waiting := _wait_for_nodes(job, current, Decision(Phase.PREPARING, Reason.PREPARING, message), now):
            return waiting
    try:
        return _make_plan(job, prepared, gpu_nodes)
    except DoesNotFitError as error:
        message = f"spec.model.uri: {prepared.model.architecture} {error}"
        refusal = Decision(Phase.PREPARING, Reason.DOES_NOT_FIT, message)
        return _wait_for_nodes(job, current, refusal, now) or _refuse(refusal, prepared, current)
    except MismatchError as error:
        return Decision(Phase.FAILED, Reason.INVALID_SPEC, str(error), prepared=prepared)


def _make_plan(job: Job, prepared: Prepared, gpu_nodes: Sequence[Manifest] | None) -> Plan:
    nodes, resources = gpu_nodes or (), job.spec.resources
    plan = make_plan(job.spec, prepared, read_gpu_inventory(nodes, resources), find_unusable_nodes(nodes, resources))
    return plan if gpu_nodes is not None else plan.model_copy(update={"reasons": (*plan.reasons, _NOT_LISTED)})


def _wait_for_nodes(job: Job, current: Preparation, decision: Decision, now: datetime) -> Decision | None:
    """Wait for other nodes, and hold no GPU meanwhile; None if the patience is over, or the status does not keep it."""
    if job.status.preparation is None and (job.status.phase, job.status.reason) == (decision.phase, decision.reason):
        return None  # the installed CRD is older than the operator
    now = now.replace(microsecond=0)
    waiting = current if current.reason is decision.reason else Preparation(number=current.number)
    since = min((waiting.failing_since or now) + absence(waiting.retry_at, now), now)
    deadline = since + (PATIENCE if decision.reason is Reason.DOES_NOT_FIT else LISTING_PATIENCE)
    if now >= deadline:
        return None
    pause = min(max(now - since, FIRST_PAUSE), LONGEST_PAUSE)
    is_due = waiting.retry_at is None or waiting.retry_at <= now
    retry_at = min(now + pause, deadline) if is_due else waiting.retry_at
    record = {"reason": decision.reason, "message": decision.message, "failing_since": since, "retry_at": retry_at}
    return Decision(
        decision.phase,
        decision.reason,
        f"{decision.message}; the nodes are checked again until {format_until(since, deadline)}",
        preparation=waiting.model_copy(update=record),
        requeue_at=retry_at,
    )


def _refuse(refusal: Decision, prepared: Prepared, current: Preparation) -> Decision:
    since = current.failing_since
    checked = f"; the nodes were checked again since {since:%Y-%m-%d %H:%M} UTC" if since else ""
    return Decision(Phase.FAILED, refusal.reason, f"{refusal.message}{checked}", prepared=prepared)
