"""Retry policy: whether another attempt can fix a failure, with what change, and after what back-off."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final

from qlora_api.reasons import REASONS, Reason, RetryAction
from qlora_api.units import format_gib
from qlora_api.v1alpha1 import Attempt, DeadlinesSpec, Plan, to_timedelta
from qlora_operator.lifecycle.container_time import container_time
from qlora_operator.models import JobState

MOST_ATTEMPTS: Final = 100
"""Maximum length of status.attempts."""
AT_ONCE: Final = timedelta(0)
"""Requeue as soon as the status is written."""
LONGEST_WAIT: Final = timedelta(days=3650)
"""Cap on durations: 9999999d is valid, but adding it to a date would overflow."""
FIRST_PAUSE: Final = timedelta(seconds=10)
LONGEST_PAUSE: Final = timedelta(minutes=5)


def used_attempts(attempts: Sequence[Attempt]) -> int:
    """Return how many attempts count against spec.retries.maxAttempts."""
    reasons = (attempt.reason for attempt in attempts if attempt.reason is not None)
    return sum(REASONS[reason].counts_against_retries for reason in reasons)


def avoided_nodes(attempts: Sequence[Attempt]) -> tuple[str, ...]:
    """Return the nodes on which attempts failed because of the node, such as a broken GPU."""
    return tuple(dict.fromkeys(attempt.node for attempt in attempts if attempt.node and _blames_node(attempt)))


def _blames_node(attempt: Attempt) -> bool:
    return attempt.reason is not None and REASONS[attempt.reason].retry is RetryAction.OTHER_NODE


def time_left(deadlines: DeadlinesSpec, attempts: Sequence[Attempt], now: datetime) -> timedelta:
    """Return what the containers of all attempts left of spec.deadlines.total; negative if they exceeded it."""
    return min(to_timedelta(deadlines.total), LONGEST_WAIT) - container_time(attempts, now)


def choose_remedy(state: JobState, plan: Plan) -> RetryAction | None:
    """Return what another attempt would do differently; None if somebody has to fix the cause first."""
    action = REASONS[state.reason].retry
    if state.reason is Reason.HOST_OUT_OF_MEMORY and plan.device != "cpu":
        return None  # host memory holds rows and loading model, whatever the micro-batch
    return action if action is not RetryAction.SHRINK_MICRO_BATCH or can_shrink(plan) else None


def can_shrink(plan: Plan) -> bool:
    """Return whether a smaller micro-batch or gradient checkpointing is left to try.

    If the plan leaves checkpointing to the trainer (None), the trainer has already chosen it by free memory.
    """
    return plan.micro_batch_size > 1 or plan.gradient_checkpointing is False


def shrink(plan: Plan, attempt: int) -> Plan:
    """Return the plan with half the micro-batch, or with checkpointing if that is 1; equal results but for rounding."""
    rows, passes = plan.micro_batch_size, plan.gradient_accumulation
    if rows == 1:
        reason = f"gradient checkpointing on: attempt {attempt} ran out of memory with 1 row"
        return _corrected(plan, reason, gradient_checkpointing=True)
    micro_batch = rows // 2
    accumulation = -(-rows * passes // micro_batch)
    sizes = f"micro-batch {micro_batch}, gradient accumulation {accumulation}"
    reason = f"{sizes}: attempt {attempt} ran out of memory with {rows} rows"
    return _corrected(plan, reason, micro_batch_size=micro_batch, gradient_accumulation=accumulation)


def _corrected(plan: Plan, reason: str, **change: int | bool) -> Plan:
    """Return the changed plan, and move the memory estimate that proved too low into the reason."""
    estimate = f", where {format_gib(plan.peak_bytes)} were predicted" if plan.peak_bytes else ""
    return plan.model_copy(update={**change, "peak_bytes": None, "reasons": (*plan.reasons, f"{reason}{estimate}")})


def retry_at(attempts: Sequence[Attempt]) -> datetime | None:
    """Return when the back-off before the next attempt ends; None if there is none."""
    last = attempts[-1] if attempts else None
    if last is None or last.finished_at is None or last.reason is None or not REASONS[last.reason].needs_time:
        return None
    doublings = used_attempts(attempts) - 1
    pause = min(FIRST_PAUSE.total_seconds() * 2.0**doublings, LONGEST_PAUSE.total_seconds())
    return last.finished_at + timedelta(seconds=pause)
