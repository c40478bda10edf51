"""What a decision depends on besides the cluster: the time and the progress reports."""

from dataclasses import dataclass
from datetime import datetime, timedelta

from qlora_api.v1alpha1 import Progress, to_timedelta
from qlora_operator.lifecycle.retry_policy import LONGEST_WAIT
from qlora_operator.models import ChildJob, Job


@dataclass(frozen=True)
class ReconcileContext:
    """The time of a reconcile, and the progress report known by then."""

    now: datetime
    last_report: Progress | None = None
    """The last progress report that this operator process received."""
    reports_since: datetime | None = None
    """When this operator process began to accept reports; None if it does not yet."""
    report_job_uid: str | None = None
    """uid of the QLoRAJob whose pod sent the last report, which may have been an earlier one; None if not known."""


def startup_timeout(job: Job) -> timedelta:
    """Return spec.deadlines.startup, capped so that adding it to a date cannot overflow."""
    return min(to_timedelta(job.spec.deadlines.startup), LONGEST_WAIT)


def heartbeat_deadline(job: Job, train: ChildJob, context: ReconcileContext) -> datetime | None:
    """Return when a running attempt counts as hung without another report; None if it has never reported.

    A pod that cannot reach the operator loses only its reports, so only a pod that has reported once is expected to
    continue. The trainer's watchdog exits after one heartbeat; the second one leaves it time to.
    """
    report = context.last_report or job.status.last_report
    # Not the start time of the pods, which comes from the clocks of their nodes.
    created = [pod.created_at for pod in train.pods if pod.created_at is not None]
    if report is None or context.reports_since is None or not created or report.updated_at < max(created):
        return None
    timeout = min(2 * to_timedelta(job.spec.deadlines.heartbeat), LONGEST_WAIT)
    return max(report.updated_at, context.reports_since) + timeout
