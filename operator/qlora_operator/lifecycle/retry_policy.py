"""After a failed attempt: whether another one can fix it, with what change, and when."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final

from qlora_api.reasons import REASONS, Reason, RetryAction
from qlora_api.units import format_gib
from qlora_api.v1alpha1 import Attempt, DeadlinesSpec, Plan, to_timedelta
from qlora_operator.models import JobState

MOST_ATTEMPTS: Final = 100
"""Entries that status.attempts may have."""
AT_ONCE: Final = timedelta(0)
"""The next step waits for nothing but this one's record."""
LONGEST_WAIT: Final = timedelta(days=3650)
"""9999999d is a valid duration, and ends after the last date there is."""
FIRST_PAUSE: Final = timedelta(seconds=10)
LONGEST_PAUSE: Final = timedelta(minutes=5)


def used_attempts(attempts: Sequence[Attempt]) -> int:
    """Return how many attempts count."""
    ends = (attempt.reason for attempt in attempts if attempt.reason is not None)
    return sum(REASONS[reason].counts_against_retries for reason in ends)


def avoided_nodes(attempts: Sequence[Attempt]) -> tuple[str, ...]:
    """Return the nodes that did not have what they promise."""
    return tuple(dict.fromkeys(attempt.node for attempt in attempts if attempt.node and _blames_node(attempt)))


def _blames_node(attempt: Attempt) -> bool:
    return attempt.reason is not None and REASONS[attempt.reason].retry is RetryAction.OTHER_NODE


def time_left(deadlines: DeadlinesSpec, attempts: Sequence[Attempt]) -> timedelta:
    """Return what ended attempts left of spec.deadlines.total; negative where nothing is."""
    spent = (
        attempt.finished_at - attempt.started_at for attempt in attempts if attempt.started_at and attempt.finished_at
    )
    return min(to_timedelta(deadlines.total), LONGEST_WAIT) - sum(spent, timedelta(0))


def choose_remedy(verdict: JobState, plan: Plan) -> RetryAction | None:
    """Return what another attempt would do differently; None where somebody has to fix the cause first."""
    remedy = REASONS[verdict.reason].retry
    if verdict.reason is Reason.HOST_OUT_OF_MEMORY and plan.device != "cpu":
        return None  # the host's memory holds the rows and the model while it is loaded, whatever the micro-batch
    return remedy if remedy is not RetryAction.SHRINK_MICRO_BATCH or can_shrink(plan) else None


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
    if last is None or last.finished_at is None or last.reason is None or not REASONS[last.reason].needs_time:
        return None
    doublings = used_attempts(attempts) - 1
    pause = min(FIRST_PAUSE.total_seconds() * 2.0**doublings, LONGEST_PAUSE.total_seconds())
    return last.finished_at + timedelta(seconds=pause)
