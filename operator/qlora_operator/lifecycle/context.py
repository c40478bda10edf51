"""What a decision depends on beside the cluster: the time, and what the run's pods have told."""

from dataclasses import dataclass
from datetime import datetime, timedelta

from qlora_api.v1alpha1 import Progress, to_timedelta
from qlora_operator.lifecycle.retry_policy import LONGEST_WAIT
from qlora_operator.models import ChildJob, Job


@dataclass(frozen=True)
class ReconcileContext:
    """The time, and the reports until then."""

    now: datetime
    last_report: Progress | None = None
    """The last report that this operator took."""
    reports_since: datetime | None = None
    """Since when this operator takes reports; none: it does not."""


def startup_timeout(job: Job) -> timedelta:
    """Return spec.deadlines.startup, within what a calendar can add."""
    return min(to_timedelta(job.spec.deadlines.startup), LONGEST_WAIT)


def heartbeat_deadline(job: Job, train: ChildJob, context: ReconcileContext) -> datetime | None:
    """Return when the silence of a running attempt has lasted too long; None where it has never spoken.

    A pod that cannot reach the operator loses its reports and nothing else, so only who spoke once is expected to go
    on. The trainer watches itself and ends after one heartbeat; the second one is for that.
    """
    report = context.last_report or job.status.last_report
    # Not when they started: that is told by the clocks of their nodes.
    created = [pod.created_at for pod in train.pods if pod.created_at is not None]
    if report is None or context.reports_since is None or not created or report.updated_at < max(created):
        return None
    patience = min(2 * to_timedelta(job.spec.deadlines.heartbeat), LONGEST_WAIT)
    return max(report.updated_at, context.reports_since) + patience
