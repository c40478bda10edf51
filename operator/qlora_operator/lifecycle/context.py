"""What a decision depends on besides the cluster: the time and the progress reports."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final

from qlora_api import names
from qlora_api.gpu_prices import NO_PRICES, GpuPrices
from qlora_api.v1alpha1 import Progress, Toleration, to_timedelta
from qlora_operator.lifecycle.budgets import LONGEST_WAIT
from qlora_operator.models import ChildJob, Job

RECEPTION_GAP: Final = timedelta(minutes=5)
"""Trainers report every 5 s, so the operator has received nothing for so long only if nothing reaches it."""
TOKEN_RENEWAL: Final = timedelta(seconds=names.TOKEN_SECONDS)
"""How long after its last report the token of a pod may be refused: until its kubelet has requested a new one, because
the ServiceAccount was created anew."""
ALONE_FACTOR: Final = 3
"""How many times longer a run may be silent if no other run of its namespace shows that reports arrive."""


@dataclass(frozen=True)
class Reception:
    """Which reports the progress server received from the other running pods of a namespace."""

    last_reports: tuple[datetime, ...] = ()
    """When each of the other QLoRAJobs that should report last did."""
    resumed_at: datetime | None = None
    """When reports of the namespace arrived first, or again after it was quiet; None if none did."""
    refused_at: datetime | None = None
    """When a report was refused last whose token names a pod of the run; None if none was."""


@dataclass(frozen=True)
class Claimant:
    """An installation, which claims QLoRAJobs in their status (docs/decisions/0030-installations.md)."""

    installation: str = ""
    """Namespace and name of its Lease; empty outside a cluster, where there is none."""
    former: frozenset[str] = frozenset()
    """Installations that are gone, or no longer watch the namespace: their claims are void."""
    claims_first: bool = False
    """Whether it has yet to claim a QLoRAJob of the namespace, which it does before it acts on any."""

    def find_other(self, claim: object) -> str:
        """Return the installation that a QLoRAJob belongs to if it is another one; the claim may be of any type."""
        others = isinstance(claim, str) and claim not in {"", self.installation, *self.former}
        return str(claim) if others else ""

    def must_claim(self, claim: object) -> bool:
        """Return whether a claim has to be written before anything else."""
        return self.claims_first and claim != self.installation


NODE_FAILURES_LOAD: Final = timedelta(minutes=5)
"""After its start an operator reads the statuses of all runs within this time; 10,000 take less than a minute."""


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
    quarantined_nodes: Mapping[str, datetime] = field(default_factory=dict)
    """Nodes that ended attempts of several runs, and until when no run uses them."""
    bad_nodes: Collection[str] = ()
    """Nodes that were quarantined within the last hours."""
    node_failures_known: bool = True
    """Whether the statuses of all runs have been read since the operator started, so that no quarantine is missing."""
    reception: Reception = Reception()
    """Whether the reports of other runs in the namespace arrive."""
    claimant: Claimant = Claimant()
    """The installation that this operator process belongs to."""
    prices: GpuPrices = NO_PRICES
    """Prices of a GPU-hour in this installation."""
    node_selector: Mapping[str, str] = field(default_factory=dict)
    """Node labels that the installation requires for training pods."""
    tolerations: tuple[Toleration, ...] = ()
    """Tolerations that the installation gives to training pods."""


def startup_timeout(job: Job) -> timedelta:
    """Return spec.deadlines.startup, capped so that adding it to a date cannot overflow."""
    return min(to_timedelta(job.spec.deadlines.startup), LONGEST_WAIT)


def heartbeat_deadline(job: Job, train: ChildJob, context: ReconcileContext) -> datetime | None:
    """Return when a running attempt counts as hung without another report; None if it has never reported.

    A pod that cannot reach the operator loses only its reports, so only a pod that has reported once is expected to
    continue. The trainer's watchdog exits after one heartbeat; the second one leaves it time to. If every run of the
    namespace fell silent, the reports do not arrive, and no run counts as hung; a run that is alone has longer.
    A pod whose reports are refused is alive, until its kubelet has renewed its token; afterwards anybody may send them.
    """
    report = context.last_report or job.status.last_report
    # Not the start time of the pods, which comes from the clocks of their nodes.
    created = [pod.created_at for pod in train.pods if pod.created_at is not None]
    if report is None or context.reports_since is None or not created or report.updated_at < max(created):
        return None
    timeout = min(2 * to_timedelta(job.spec.deadlines.heartbeat), LONGEST_WAIT)
    reception = context.reception
    refused_at = min(reception.refused_at or report.updated_at, report.updated_at + TOKEN_RENEWAL)
    since = context.reports_since
    silent_since = max(report.updated_at, refused_at, since, reception.resumed_at or since)
    others = [moment for moment in reception.last_reports if moment >= report.updated_at - RECEPTION_GAP]
    if not others:
        return silent_since + ALONE_FACTOR * timeout
    if max(others) < context.now - RECEPTION_GAP:
        return max(silent_since + timeout, context.now + RECEPTION_GAP)
    return silent_since + timeout
