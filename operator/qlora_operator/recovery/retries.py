"""After a failed attempt: whether another one can mend it, with what, and when; a pure table."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Final

from qlora_api.names import Reason
from qlora_api.units import format_gib
from qlora_api.v1alpha1 import Attempt, DeadlinesSpec, Plan, to_timedelta
from qlora_operator.values import Verdict


class Remedy(StrEnum):
    """What the next attempt does differently."""

    RESUME = "resume"
    """Nothing: what went wrong lies outside."""
    ELSEWHERE = "elsewhere"
    """It avoids the node."""
    SHRINK = "shrink"
    """Half the rows per forward pass, and twice the passes."""


REMEDY_SENTENCES: Final = {
    Remedy.RESUME: "another one goes on from the last checkpoint",
    Remedy.ELSEWHERE: "another one goes on from the last checkpoint, on another node",
    Remedy.SHRINK: "another one goes on with half the micro-batch and twice the accumulation",
}
"""For the reference of reasons."""

REMEDIES: Final = {
    Reason.INTERRUPTED: Remedy.RESUME,
    Reason.PREEMPTED: Remedy.RESUME,
    Reason.EVICTED: Remedy.RESUME,
    Reason.NODE_LOST: Remedy.RESUME,
    Reason.HEARTBEAT_LOST: Remedy.RESUME,
    Reason.ACCELERATOR_MISSING: Remedy.ELSEWHERE,
    Reason.COLLECTIVE_TIMEOUT: Remedy.RESUME,
    Reason.S3_UNAVAILABLE: Remedy.RESUME,
    Reason.UPLOAD_FAILED: Remedy.RESUME,
    Reason.HUB_UNAVAILABLE: Remedy.RESUME,
    Reason.HUB_RATE_LIMITED: Remedy.RESUME,
    Reason.CUDA_OUT_OF_MEMORY: Remedy.SHRINK,
    Reason.HOST_OUT_OF_MEMORY: Remedy.SHRINK,
}
"""Reasons that are not in here are for somebody to correct first."""
DISRUPTIONS: Final = frozenset(
    {Reason.INTERRUPTED, Reason.PREEMPTED, Reason.NODE_LOST, Reason.POD_LOST, Reason.SUSPENDED_BY_USER}
)
"""Ends that say nothing about the run: they do not use up spec.retries.maxAttempts."""
MOST_ATTEMPTS: Final = 100
"""Entries that status.attempts may have."""
AT_ONCE: Final = timedelta(0)
"""The next step waits for nothing but this one's record."""
LONGEST_WAIT: Final = timedelta(days=3650)
"""9999999d is a valid duration, and ends after the last date there is."""
_AVOIDING: Final = frozenset(reason for reason, remedy in REMEDIES.items() if remedy is Remedy.ELSEWHERE)
_SERVICES: Final = frozenset(
    {Reason.S3_UNAVAILABLE, Reason.UPLOAD_FAILED, Reason.HUB_UNAVAILABLE, Reason.HUB_RATE_LIMITED}
)
"""What needs time to recover."""
_FIRST_PAUSE: Final = timedelta(seconds=10)
_LONGEST_PAUSE: Final = timedelta(minutes=5)


def used_attempts(attempts: Sequence[Attempt]) -> int:
    """Return how many attempts count."""
    return sum(attempt.reason is not None and attempt.reason not in DISRUPTIONS for attempt in attempts)


def avoided_nodes(attempts: Sequence[Attempt]) -> tuple[str, ...]:
    """Return the nodes that did not have what they promise."""
    failed = (attempt.node for attempt in attempts if attempt.reason in _AVOIDING and attempt.node)
    return tuple(dict.fromkeys(failed))


def time_left(deadlines: DeadlinesSpec, attempts: Sequence[Attempt]) -> timedelta:
    """Return what ended attempts left of spec.deadlines.total; negative where nothing is."""
    spent = (
        attempt.finished_at - attempt.started_at for attempt in attempts if attempt.started_at and attempt.finished_at
    )
    return min(to_timedelta(deadlines.total), LONGEST_WAIT) - sum(spent, timedelta(0))


def choose_remedy(verdict: Verdict, plan: Plan) -> Remedy | None:
    """Return what could mend a failure; None where nothing can but a person."""
    remedy = REMEDIES.get(verdict.reason)
    if verdict.reason is Reason.HOST_OUT_OF_MEMORY and plan.device != "cpu":
        return None  # the host's memory holds the rows and the model while it is loaded, whatever the micro-batch
    return remedy if remedy is not Remedy.SHRINK or can_shrink(plan) else None


def can_shrink(plan: Plan) -> bool:
    """Return whether a pass can do with less memory; where the trainer decides on checkpointing, it saw that memory."""
    return plan.micro_batch_size > 1 or plan.gradient_checkpointing is False


def shrink(plan: Plan, attempt: int) -> Plan:
    """Return the plan with half the rows per forward pass, or a single row recomputed: the same result but rounding."""
    rows, passes = plan.micro_batch_size, plan.gradient_accumulation
    if rows == 1:
        reason = f"gradient checkpointing on: attempt {attempt} ran out of memory with 1 row"
        return _corrected(plan, reason, gradient_checkpointing=True)
    smaller = rows // 2
    more = -(-rows * passes // smaller)
    reason = (
        f"micro-batch {smaller}, gradient accumulation {more}: attempt {attempt} ran out of memory with {rows} rows"
    )
    return _corrected(plan, reason, micro_batch_size=smaller, gradient_accumulation=more)


def _corrected(plan: Plan, reason: str, **change: int | bool) -> Plan:
    """Return the plan with a change and without the estimate that proved too low, which the reason keeps."""
    estimate = f", where {format_gib(plan.peak_bytes)} were predicted" if plan.peak_bytes else ""
    return plan.model_copy(update={**change, "peak_bytes": None, "reasons": (*plan.reasons, f"{reason}{estimate}")})


def retry_at(attempts: Sequence[Attempt]) -> datetime | None:
    """Return when the next attempt may start; None: at once."""
    last = attempts[-1] if attempts else None
    if last is None or last.finished_at is None or last.reason not in _SERVICES:
        return None
    doublings = used_attempts(attempts) - 1
    pause = min(_FIRST_PAUSE.total_seconds() * 2.0**doublings, _LONGEST_PAUSE.total_seconds())
    return last.finished_at + timedelta(seconds=pause)
