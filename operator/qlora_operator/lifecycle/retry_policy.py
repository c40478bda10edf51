"""Retry policy: whether another attempt can fix a failure, and with what change; `budgets` says how often."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final

from qlora_api.reasons import REASONS, Domain, Reason, RetryAction
from qlora_api.units import format_gib
from qlora_api.v1alpha1 import Attempt, Plan
from qlora_operator.lifecycle.budgets import since_progress
from qlora_operator.lifecycle.container_time import container_time
from qlora_operator.models import JobState

AT_ONCE: Final = timedelta(0)
"""Requeue as soon as the status is written."""


GOT_GOING: Final = timedelta(minutes=10)
"""An attempt that ran for so long has loaded model and dataset, when most host memory is used, and has had access to
all of its inputs: a 70B model is read in about five minutes at 500 MB/s."""
_ACCESS_DENIED: Final = frozenset({Reason.S3_DENIED, Reason.GATED_MODEL_NO_ACCESS})


def find_domain(state: JobState, plan: Plan | None, attempts: Sequence[Attempt], now: datetime) -> Domain | None:
    """Return where the cause of an attempt's end lies, if what the run did before says so; None: as its reason does.

    Args:
        state: How the attempt ended.
        plan: The plan that it followed.
        attempts: All attempts of the run, the ended one last.
        now: When it ended.

    """
    if state.reason in _ACCESS_DENIED and any(_got_going(attempt, now) for attempt in attempts):
        return Domain.SERVICE  # its keys have expired or were changed since, and somebody will renew them
    if state.reason is Reason.HOST_OUT_OF_MEMORY and plan is not None and plan.device != "cpu":
        # With cgroup v2, a kill by any parent cgroup looks like one by the container's limit (containerd#6735).
        return Domain.NODE if _is_first_after_going_well(attempts, now) else None
    return state.domain


def _got_going(attempt: Attempt, now: datetime) -> bool:
    return bool(attempt.checkpoint_step) or container_time([attempt], now) >= GOT_GOING


def _is_first_after_going_well(attempts: Sequence[Attempt], now: datetime) -> bool:
    """Return whether the last attempt ran for long, or wrote a checkpoint, and none ended alike since that."""
    last, counted = attempts[-1], since_progress(attempts)
    got_further = bool(last.checkpoint_step) and counted == (last,)
    alike = sum(attempt.reason is last.reason for attempt in counted)
    return alike == 1 and (got_further or container_time([last], now) >= GOT_GOING)


def choose_remedy(state: JobState, plan: Plan) -> RetryAction | None:
    """Return what another attempt would do differently; None if somebody has to fix the cause first."""
    if state.domain is Domain.NODE and state.reason is Reason.HOST_OUT_OF_MEMORY:
        return RetryAction.PREFER_OTHER_NODE
    if state.domain is Domain.SERVICE and state.reason in _ACCESS_DENIED:
        return RetryAction.RESUME
    action = None if state.domain is Domain.AUTHOR else REASONS[state.reason].retry
    if state.reason is Reason.HOST_OUT_OF_MEMORY and plan.device != "cpu":
        return None  # host memory holds rows and loading model, whatever the micro-batch
    return action if action is not RetryAction.SHRINK_MICRO_BATCH or can_shrink(plan) else None


def can_shrink(plan: Plan) -> bool:
    """Return whether a smaller micro-batch, gradient checkpointing or a larger GPU is left to try.

    If the plan leaves checkpointing to the trainer (None), the trainer has already chosen it by free memory.
    """
    larger_gpus = len(plan.gpu_products or ()) > 1
    return plan.micro_batch_size > 1 or plan.gradient_checkpointing is False or larger_gpus


def shrink(plan: Plan, attempt: int) -> Plan:
    """Return the plan with half the micro-batch; if that is 1, with checkpointing, and then without the smallest GPU.

    The results are equal but for rounding.
    """
    rows, passes = plan.micro_batch_size, plan.gradient_accumulation
    if rows == 1 and plan.gradient_checkpointing is not False and plan.gpu_products:
        return _without_smallest_gpu(plan, attempt)
    if rows == 1:
        reason = f"gradient checkpointing on: attempt {attempt} ran out of memory with 1 row"
        return _corrected(plan, reason, gradient_checkpointing=True)
    micro_batch = rows // 2
    accumulation = -(-rows * passes // micro_batch)
    sizes = f"micro-batch {micro_batch}, gradient accumulation {accumulation}"
    reason = f"{sizes}: attempt {attempt} ran out of memory with {rows} rows"
    return _corrected(plan, reason, micro_batch_size=micro_batch, gradient_accumulation=accumulation)


def _without_smallest_gpu(plan: Plan, attempt: int) -> Plan:
    """Return the plan without the GPU product that it was sized for; where that one was not used, it is smaller."""
    larger = tuple(product for product in plan.gpu_products or () if product != plan.gpu_product)
    reason = f"{plan.gpu_product} left out: attempt {attempt} ran out of memory with 1 row"
    return _corrected(plan, reason, gpu_products=larger, gpu_product=larger[0])


def _corrected(plan: Plan, reason: str, **change: object) -> Plan:
    """Return the changed plan, and move the memory estimate that proved too low into the reason."""
    estimate = f", where {format_gib(plan.peak_bytes)} were predicted" if plan.peak_bytes else ""
    return plan.model_copy(update={**change, "peak_bytes": None, "reasons": (*plan.reasons, f"{reason}{estimate}")})
