"""What a pod did while it held its GPUs, by its times and the progress reports of its run."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Final, NamedTuple

from qlora_api.names import Phase
from qlora_api.v1alpha1 import Progress
from qlora_api.v1alpha1.usage import PARTS

_PART_OF_PHASE: Final = {Phase.EVALUATING: "evaluating", Phase.PUBLISHING: "publishing"}

Parts = dict[str, int]
"""Seconds of one pod, by part."""


@dataclass(frozen=True)
class Reports:
    """The two newest progress reports of a run, and the highest step before the newest."""

    before: Progress | None
    last: Progress | None
    highest_step: int

    def since(self, moment: datetime) -> "Reports":
        """Return the reports that a pod which is bound to its node since then can have sent."""
        before, last = (
            report if report and report.updated_at >= moment else None for report in (self.before, self.last)
        )
        return Reports(before, last, self.highest_step)


@dataclass(frozen=True)
class Timeline:
    """What is known of one pod: when it was bound, all pods of the run were, its trainer ended, and it did."""

    bound: datetime
    gang_bound: datetime | None
    started: datetime | None = None
    exited: datetime | None = None
    released: datetime | None = None


class Span(NamedTuple):
    """A period of time of one pod."""

    start: datetime
    end: datetime

    @property
    def seconds(self) -> int:
        """Return its length."""
        return max(int((self.end - self.start).total_seconds()), 0)

    def up_to(self, moment: datetime) -> "Span":
        """Return the part of it before a moment."""
        return Span(self.start, min(max(moment, self.start), self.end))

    def after(self, moment: datetime) -> "Span":
        """Return the part of it after a moment."""
        return Span(max(min(moment, self.end), self.start), self.end)


def split(span: Span, timeline: Timeline, reports: Reports, *, idle: bool) -> Parts:
    """Return the seconds of a pod in a span of time by part.

    Args:
        span: The time.
        timeline: What is known of the pod.
        reports: What it can have reported.
        idle: Whether it did nothing after its last report.

    """
    parts = dict.fromkeys(PARTS, 0)
    gang_bound, exited = timeline.gang_bound or span.end, timeline.exited or span.end
    parts["idle"] += span.up_to(gang_bound).seconds + span.after(max(exited, gang_bound)).seconds
    span = span.after(gang_bound).up_to(exited)
    for piece, part in _pieces(span, timeline.started or span.start, reports, idle=idle):
        parts[part] += piece
    return parts


def _pieces(span: Span, started: datetime, reports: Reports, *, idle: bool) -> Iterator[tuple[int, str]]:
    """Yield what a pod did between the start of its run and the end of its trainer, by its reports."""
    before, last = reports.before, reports.last
    if last is None:
        yield span.seconds, "starting"
        return
    if before is None:
        yield span.up_to(last.updated_at).seconds, "starting"
    else:
        # Only of a run that an earlier version watched is anything before that report still to be accounted.
        earlier, between = span.up_to(before.updated_at), span.after(before.updated_at).up_to(last.updated_at)
        yield earlier.up_to(started).seconds, "starting"
        yield earlier.after(started).seconds, _part_of(before)
        repeated = round(between.seconds * _repeated_share(before, last, reports.highest_step))
        yield between.seconds - repeated, _part_of(before)
        yield repeated, "repeated"
    repeats = _part_of(last) == "training" and (last.step or 0) < reports.highest_step
    yield span.after(last.updated_at).seconds, "idle" if idle else "repeated" if repeats else _part_of(last)


def _part_of(report: Progress) -> str:
    """Return what a run does since it reported; before its first step, it loads model and data."""
    if report.phase is None or report.phase is Phase.TRAINING:
        return "training" if report.loss is not None or report.step else "starting"
    return _PART_OF_PHASE.get(report.phase, "training")


def _repeated_share(before: Progress, last: Progress, highest: int) -> float:
    """Return the share of the time between two reports that went into steps that an earlier attempt had done."""
    if _part_of(before) != "training":
        return 0.0
    start, end = before.step or 0, last.step or 0
    if end <= start:
        return float(start < highest)
    return min(max(highest - start, 0) / (end - start), 1.0)
