"""What runs held of GPUs in a period, added up by run, team or month; knows neither the cluster nor the terminal.

A status has the GPU time of each attempt as a whole. Where a period or a month ends within an attempt, its time is
divided in proportion.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Final

from qlora_api.gpu_prices import GpuPrices, cost_of
from qlora_api.lost_gpu_time import lost_by_attempt
from qlora_api.names import Phase
from qlora_api.reasons import Reason
from qlora_api.v1alpha1 import AttemptUsage, GpuUsage, QLoRAJobStatus
from qlora_api.v1alpha1.usage import PARTS
from qlora_cli.cluster.jobs import ClusterJob

RUN: Final = "run"
NAMESPACE: Final = "namespace"
MONTH: Final = "month"
LABEL: Final = "label="
"""Start of a key of --by that names a label."""
_EARLIEST: Final = datetime(1, 1, 1, tzinfo=UTC)
_LATEST: Final = datetime(9999, 1, 1, tzinfo=UTC)
_OPEN_PARTS: Final = {Phase.TRAINING: "training", Phase.EVALUATING: "evaluating", Phase.PUBLISHING: "publishing"}
"""What pods are taken to do since their time was last accounted; in other phases they start."""


@dataclass(frozen=True)
class Period:
    """From a moment, to before another."""

    since: datetime = _EARLIEST
    until: datetime = _LATEST

    def months(self) -> Iterator["Period"]:
        """Yield the months of it, cut at its ends."""
        start = self.since
        while start < self.until:
            end = min(next_month(start), self.until)
            yield Period(start, end)
            start = end

    def share(self, since: datetime, until: datetime) -> float:
        """Return the share of a span of time that lies in it."""
        length = (until - since).total_seconds()
        if length <= 0:
            return float(self.since <= since < self.until)
        return max((min(until, self.until) - max(since, self.since)).total_seconds(), 0.0) / length


def next_month(moment: datetime) -> datetime:
    """Return the first moment of the next month in UTC."""
    first = moment.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    return (first + timedelta(days=32)).replace(day=1)


@dataclass
class GpuTime:
    """GPU-seconds of several attempts in a period, and what they cost."""

    runs: set[tuple[str, str]] = field(default_factory=set)
    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    lost: dict[Reason, float] = field(default_factory=dict)
    costs: dict[str, Decimal] = field(default_factory=dict)
    """By currency."""
    unpriced: float = 0.0
    """GPU-seconds without a price."""

    @property
    def held(self) -> float:
        """Return what was held."""
        return sum(self.parts.values())

    def lost_by_reason(self) -> list[tuple[Reason, float]]:
        """Return what was lost, most first."""
        return sorted(self.lost.items(), key=lambda item: (-item[1], item[0]))

    def add(self, other: "GpuTime") -> None:
        """Add GPU time."""
        self.runs |= other.runs
        for part, seconds in other.parts.items():
            self.parts[part] += seconds
        for reason, seconds in other.lost.items():
            self.lost[reason] = self.lost.get(reason, 0.0) + seconds
        for currency, amount in other.costs.items():
            self.costs[currency] = self.costs.get(currency, Decimal(0)) + amount
        self.unpriced += other.unpriced


@dataclass(frozen=True)
class Row:
    """One line of the report."""

    keys: tuple[str, ...]
    time: GpuTime


@dataclass
class Savings:
    """What did not have to be held: results that were found, and specs that were refused before a GPU was held."""

    reused: int = 0
    reused_gpu_seconds: int = 0
    reused_unknown: int = 0
    """Results whose GPU-seconds are not known: of an earlier version, or trained on a CPU."""
    refused: Counter[Reason] = field(default_factory=Counter)
    refused_gpus: int = 0
    """GPUs that the refused runs asked for; for how long is not known."""


def tabulate_gpu_time(
    jobs: Sequence[ClusterJob], keys: Sequence[str], period: Period, now: datetime, prices: GpuPrices | None = None
) -> list[Row]:
    """Return the GPU time of runs by the values of keys, in their order."""
    rows: dict[tuple[str, ...], GpuTime] = {}
    for job in jobs:
        for usage, lost in _usages(job.status, now):
            for part in _by_month(period, usage) if MONTH in keys else [period]:
                share = part.share(usage.since or job.created_at, usage.until or now)
                if not share or not usage.held:
                    continue
                time = _weigh(job, usage, lost, share, prices)
                rows.setdefault(tuple(_value(job, key, part) for key in keys), GpuTime()).add(time)
    return [Row(values, rows[values]) for values in sorted(rows)]


def total_of(rows: Iterable[Row]) -> GpuTime:
    """Return the sum of rows."""
    total = GpuTime()
    for row in rows:
        total.add(row.time)
    return total


def savings_of(jobs: Iterable[ClusterJob], period: Period) -> Savings:
    """Return what runs that ended in a period did without a GPU."""
    savings = Savings()
    for job in jobs:
        status, ended = job.status, job.status.finished_at
        if ended is None or not period.since <= ended < period.until or status.attempts:
            continue
        if status.reason is Reason.ALREADY_PUBLISHED:
            saved = status.usage.saved if status.usage else 0
            savings.reused += 1
            savings.reused_gpu_seconds += saved
            savings.reused_unknown += not saved
        elif status.phase is Phase.FAILED and status.reason is not None:
            resources = job.raw["spec"].get("resources") or {}
            savings.refused[status.reason] += 1
            savings.refused_gpus += resources.get("nodes", 1) * resources.get("gpusPerNode", 1)
    return savings


def _by_month(period: Period, usage: GpuUsage) -> Iterator[Period]:
    since, until = usage.since or period.since, usage.until or period.until
    within = Period(max(period.since, since), min(period.until, until + timedelta(microseconds=1)))
    return within.months()


def _usages(status: QLoRAJobStatus, now: datetime) -> Iterator[tuple[GpuUsage, Counter[Reason]]]:
    """Yield the GPU time of each attempt up to now, and what of it is lost."""
    for usage, lost in lost_by_attempt(status):
        yield (_up_to(usage, status.phase, now) if isinstance(usage, AttemptUsage) else usage), lost


def _up_to(usage: AttemptUsage, phase: Phase | None, now: datetime) -> AttemptUsage:
    """Return the usage with what pods have held since it was accounted."""
    seconds = sum(max(int((now - pod.until).total_seconds()), 0) for pod in usage.holding)
    if not seconds:
        return usage
    part = _OPEN_PARTS.get(phase or Phase.PENDING, "starting")
    added = seconds * usage.gpus_per_pod
    return usage.model_copy(
        update={"held": usage.held + added, part: getattr(usage, part) + added, "until": max(now, usage.until or now)}
    )


def _weigh(job: ClusterJob, usage: GpuUsage, lost: Counter[Reason], share: float, prices: GpuPrices | None) -> GpuTime:
    time = GpuTime({(job.ref.namespace, job.ref.name)})
    time.parts = {part: getattr(usage, part) * share for part in PARTS}
    time.lost = {reason: seconds * share for reason, seconds in lost.items() if seconds}
    price, currency = _price(usage, prices)
    if price is None:
        time.unpriced = usage.held * share
    else:
        time.costs[currency] = cost_of(usage.held * share, price)
    return time


def _price(usage: GpuUsage, prices: GpuPrices | None) -> tuple[str | None, str]:
    """Return the price of a GPU-hour and its currency: of the given prices, or as the operator recorded it."""
    product = usage.gpu_product if isinstance(usage, AttemptUsage) else None
    if prices is not None:
        return prices.price_of(product), prices.currency
    if isinstance(usage, AttemptUsage):
        return usage.price, usage.currency or ""
    return None, ""


def _value(job: ClusterJob, key: str, period: Period) -> str:
    if key == RUN:
        return job.ref.name
    if key == NAMESPACE:
        return job.ref.namespace
    if key == MONTH:
        return f"{period.since:%Y-%m}"
    return str((job.raw["metadata"].get("labels") or {}).get(key.removeprefix(LABEL), ""))


def format_cost(costs: Mapping[str, Decimal]) -> str:
    """Format costs as `1234.50 USD`; several currencies are joined with +."""
    return " + ".join(f"{amount:.2f} {currency}" for currency, amount in sorted(costs.items()))
