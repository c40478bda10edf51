"""Accounts for the GPU time of a run: what its pods held, and for what.

A pod holds its GPUs from its binding to a node until its last container has ended, whatever runs in it: while its image
is pulled (starting), until the other pods of the run have nodes too (idle), and while a sidecar outlives the trainer
(idle). A pod on a node that does not respond holds them until it should have ended.

The status has, for each pod that holds GPUs, up to when it is accounted: the last moment of which it is known what the
pod did, such as its last report. So a pass adds only what no later pass takes back, a new operator process continues
where the last one stopped, and a pod that has been replaced, or has gone, is counted once.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from qlora_api.gpu_prices import NO_PRICES, GpuPrices
from qlora_api.progress import MAX_COUNT
from qlora_api.reasons import Reason
from qlora_api.v1alpha1 import Attempt, AttemptUsage, GpuUsage, HeldPod, Plan, Progress, QLoRAJobStatus, RunUsage
from qlora_api.v1alpha1.usage import MAX_HOLDING, PARTS, sum_usage
from qlora_operator.lifecycle.container_time import correct_end
from qlora_operator.lifecycle.exit_reasons import deletion_end, is_abandoned
from qlora_operator.lifecycle.pod_timeline import Parts, Reports, Span, Timeline, split
from qlora_operator.models import ENDED_POD_PHASES, ChildJob, Observation, Pod

SECONDS_PER_HOUR: Final = 3600
IDLE_AFTER_LAST_REPORT: Final = frozenset({Reason.HEARTBEAT_LOST, Reason.NODE_LOST})
"""Ends of attempts that had done nothing since their last report."""

_UNKNOWN: Final = datetime(9000, 1, 1, tzinfo=UTC)
"""Time of a pod without any: it holds nothing yet."""


@dataclass(frozen=True)
class View:
    """What a pass knows besides the pods."""

    reports: Reports
    watched: bool
    """Whether a pod that is gone was there until now, since this process has seen all changes."""
    now: datetime


def account(  # noqa: PLR0913 (everything that it depends on)
    previous: QLoRAJobStatus,
    status: QLoRAJobStatus,
    children: Observation,
    report: Progress | None,
    *,
    watched: bool,
    now: datetime,
    prices: GpuPrices = NO_PRICES,
) -> QLoRAJobStatus:
    """Return the new status with the GPU time of its attempts, their sum, and the GPUs that pods hold now.

    Args:
        previous: The last status.
        status: The new status, without what this pass observes of GPU time.
        children: All Jobs of the run with their pods.
        report: The last progress report that this operator process received.
        watched: Whether a pod that is gone was there until now, since this process has seen all changes.
        now: The current time.
        prices: Prices of a GPU-hour, for attempts that begin.

    """
    view = View(_reports(previous, report), watched, now.replace(microsecond=0))
    recorded = {attempt.number: attempt for attempt in previous.attempts}
    fresh = _fresh_usage(status.plan, prices)
    attempts = tuple(
        _account_attempt(attempt, recorded.get(attempt.number), fresh, children.train(attempt.number), view)
        for attempt in status.attempts
    )
    known = [attempt.usage for attempt in attempts if attempt.usage is not None]
    if not known:
        return status.model_copy(update={"gpus": status.gpus and 0})
    earlier = [status.earlier_attempts.usage] if status.earlier_attempts and status.earlier_attempts.usage else []
    held_now = sum(len(usage.holding) * usage.gpus_per_pod for usage in known)
    last = view.reports.last
    highest_step = min(max(view.reports.highest_step, (last and last.step) or 0), MAX_COUNT)
    total = _total([*earlier, *known], highest_step, status.usage.saved if status.usage else 0)
    return status.model_copy(update={"attempts": attempts, "usage": total, "gpus": held_now})


def is_uncertain(status: QLoRAJobStatus, children: Observation, now: datetime) -> bool:
    """Return whether children from a cache contradict the accounts, so that they have to be listed.

    A pod that holds GPUs is not in the cache, or one that holds none any more still does there.
    """
    for attempt in status.attempts:
        usage, child = attempt.usage, children.train(attempt.number)
        if usage is None:
            continue
        pods = _pods(child)
        known = {pod.uid for pod in usage.holding}
        fresh = [pod for pod in pods if pod.uid not in known and holds_gpus(pod, now)]
        if known - {pod.uid for pod in pods} or any(_bound(pod) < (usage.until or _bound(pod)) for pod in fresh):
            return True
    return False


def holds_gpus(pod: Pod, now: datetime) -> bool:
    """Return whether a pod has a node and has not ended; on a node that does not respond, its grace period counts."""
    return bool(pod.node) and pod.phase not in ENDED_POD_PHASES and not is_abandoned(pod, now)


def _fresh_usage(plan: Plan | None, prices: GpuPrices) -> AttemptUsage:
    """Return the usage of an attempt whose pods have held nothing yet."""
    if plan is None or not plan.gpus_per_node:
        return AttemptUsage(gpus_per_pod=0)
    price = prices.price_of(plan.gpu_product)
    return AttemptUsage(
        gpus_per_pod=plan.gpus_per_node,
        gpu_product=plan.gpu_product,
        price=price,
        currency=prices.currency if price else None,
    )


def _reports(previous: QLoRAJobStatus, report: Progress | None) -> Reports:
    before = previous.last_report
    last = report if before is None or (report is not None and report.updated_at >= before.updated_at) else before
    recorded = previous.usage.highest_step if previous.usage else 0
    return Reports(before, last, max(recorded, (before and before.step) or 0))


def _pods(child: ChildJob | None) -> tuple[Pod, ...]:
    """Return the pods of a Job that have, or had, a node."""
    pods = (*child.pods, *child.earlier_pods, *child.replaced_pods) if child else ()
    return tuple(pod for pod in pods if _has_node(pod))


def _has_node(pod: Pod) -> bool:
    return pod.scheduled_at is not None or bool(pod.node)


def _bound(pod: Pod) -> datetime:
    """Return when a pod was bound to its node."""
    return pod.scheduled_at or pod.created_at or pod.started_at or _UNKNOWN


def _account_attempt(
    attempt: Attempt, recorded: Attempt | None, fresh: AttemptUsage, child: ChildJob | None, view: View
) -> Attempt:
    """Return an attempt with the time that its pods held since the last pass."""
    pods = _pods(child)
    of_older_version = attempt.usage is None and recorded is not None and recorded.reason is not None
    if of_older_version or (attempt.usage is None and not pods):
        return attempt
    usage = attempt.usage or fresh
    accounted = {pod.uid: pod.until for pod in usage.holding}
    # An attempt that has ended gets no more pods, so those that are not held have been accounted.
    ended_before = recorded is not None and recorded.reason is not None and recorded.usage is not None
    all_accounted = ended_before and len(accounted) < MAX_HOLDING
    holding: list[HeldPod] = []
    ends: list[datetime] = []
    spans: list[tuple[Span, Timeline]] = []
    for pod in pods:
        timeline = _timeline(pod, child, view)
        if pod.uid not in accounted and timeline.released and (all_accounted or _ended_at(pod, child) is None):
            continue  # accounted when it ended; or, if no pass saw it run, nobody knows for how long
        start = accounted.pop(pod.uid, None) or _first_known_at(timeline, usage)
        end = max(_known_until(timeline, view.reports), start)
        spans.append((Span(start, end), timeline))
        if timeline.released is not None:
            ends.append(_ended_at(pod, child) or end)
        else:
            holding.append(HeldPod(uid=pod.uid, until=end))
    for start in accounted.values():
        gone = Timeline(start, start, exited=_exited(attempt, start))
        spans.append((Span(start, _gone_at(start, child, view)), gone))
    idle = attempt.reason in IDLE_AFTER_LAST_REPORT
    parts = [split(span, timeline, view.reports.since(timeline.bound), idle=idle) for span, timeline in spans]
    added = _add(usage, [span for span, _ in spans], parts)
    # An end in the future, by its node's clock, is kept: so that the pod is not accounted again once that has come.
    until = max((moment for moment in (added.until, *ends) if moment is not None), default=None)
    return attempt.model_copy(
        update={"usage": added.model_copy(update={"until": until, "holding": tuple(holding[:MAX_HOLDING])})}
    )


def _timeline(pod: Pod, child: ChildJob | None, view: View) -> Timeline:
    """Return what is known of a pod; the times of its containers, by its node's clock, are moved into what it held."""
    now, bound = view.now, min(_bound(pod), view.now)
    # By a clock that is ahead it starts in the future: then its start is not known yet.
    started = max(pod.started_at, bound) if pod.started_at and pod.started_at <= now else None
    exited = pod.exit.finished_at if pod.exit else None
    exited = max(correct_end(pod, exited, now), started or bound) if exited else None
    ended = _ended_at(pod, child)
    known_end = correct_end(pod, ended, now) if ended else now
    released = None if holds_gpus(pod, now) else max(known_end, exited or bound)
    return Timeline(bound, _gang_bound(pod, child, view.reports), started, exited, released)


def _ended_at(pod: Pod, child: ChildJob | None) -> datetime | None:
    """Return when a pod that holds no GPUs released them, at the latest; None if that is not known."""
    if ended := pod.released_at or (pod.exit.finished_at if pod.exit else None):
        return ended
    if pod.phase not in ENDED_POD_PHASES:
        return deletion_end(pod)
    return child.finished_at if child else None


def _gang_bound(pod: Pod, child: ChildJob | None, reports: Reports) -> datetime | None:
    """Return when the last pod of a start was bound; None while some have no node, unless they have reported."""
    peers = child.earlier_pods if child and pod in child.earlier_pods else child.pods if child else ()
    bound = [_bound(peer) for peer in peers if _has_node(peer)] or [_bound(pod)]
    complete = child is None or len(bound) >= child.completions
    return max(bound) if complete or reports.since(max(bound)).last else None


def _first_known_at(timeline: Timeline, usage: AttemptUsage) -> datetime:
    """Return from when a pod counts that did not hold GPUs at the last pass.

    One that has ended was accounted when it did, unless no pass has seen it run.
    """
    if timeline.released is None:
        return timeline.bound
    return min(max(timeline.bound, usage.until or timeline.bound), timeline.released)


def _known_until(timeline: Timeline, reports: Reports) -> datetime:
    """Return up to when it is known what a pod did: nothing that is observed later changes it."""
    if timeline.released is not None:
        return timeline.released
    if timeline.gang_bound is None:
        return timeline.bound
    last = reports.since(timeline.bound).last
    facts = (timeline.gang_bound, timeline.started, last.updated_at if last else None, timeline.exited)
    return max(fact for fact in facts if fact is not None)


def _gone_at(start: datetime, child: ChildJob | None, view: View) -> datetime:
    """Return when a pod ended that does not exist any more: if nobody watched, at the last sign of it."""
    finished = child.finished_at if child else None
    if finished is not None and finished >= start:
        return min(finished, view.now)
    last = view.reports.since(start).last
    return max(start, view.now if view.watched else last.updated_at if last else start)


def _exited(attempt: Attempt, start: datetime) -> datetime | None:
    """Return the end of the trainer in a pod that is gone, as far as its attempt tells."""
    ended = attempt.finished_at if attempt.reason else None
    return max(ended, start) if ended is not None else None


def _add(usage: AttemptUsage, spans: Sequence[Span], parts: Sequence[Parts]) -> AttemptUsage:
    """Return the usage of an attempt with the time of its pods since the last pass."""
    added = {part: getattr(usage, part) + sum(pod[part] for pod in parts) * usage.gpus_per_pod for part in PARTS}
    pod_seconds = usage.pod_seconds + sum(span.seconds for span in spans)
    return usage.model_copy(
        update={
            **added,
            "pod_seconds": pod_seconds,
            "held": pod_seconds * usage.gpus_per_pod,
            "since": min((moment for moment in (usage.since, *(span.start for span in spans)) if moment), default=None),
            "until": max((moment for moment in (usage.until, *(span.end for span in spans)) if moment), default=None),
        }
    )


def _total(usages: Iterable[GpuUsage], highest_step: int, saved: int) -> RunUsage:
    total = sum_usage(usages)
    hours = f"{total.held / SECONDS_PER_HOUR:.2f}" if total.held else None
    return RunUsage(**dict(total), gpu_hours=hours, highest_step=highest_step, saved=saved)
