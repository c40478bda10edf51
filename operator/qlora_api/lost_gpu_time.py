"""Which GPU-seconds of a run led nowhere, and why: waste is counted once, for the reason that caused it.

An attempt that did not publish loses what its pods held idle, and what the next one takes to start and to repeat steps.
A run that fails loses the rest of what it held, too.
"""

from collections import Counter
from collections.abc import Iterator

from qlora_api.names import Phase
from qlora_api.reasons import Reason
from qlora_api.v1alpha1 import Attempt, GpuUsage, QLoRAJobStatus


def lost_by_attempt(status: QLoRAJobStatus) -> Iterator[tuple[GpuUsage, Counter[Reason]]]:
    """Yield the GPU time of each attempt with what of it is lost, by reason; attempts that are summed up are one."""
    earlier = status.earlier_attempts and status.earlier_attempts.usage
    if earlier:
        yield earlier, _with_rest(status, earlier, Counter())
    previous: Attempt | None = None
    for attempt in status.attempts:
        if attempt.usage is not None:
            yield attempt.usage, _with_rest(status, attempt.usage, _lost_of(attempt, attempt.usage, previous))
        previous = attempt


def lost_gpu_seconds(status: QLoRAJobStatus) -> Counter[Reason]:
    """Return the GPU-seconds that a run has lost, by reason."""
    return sum((lost for _, lost in lost_by_attempt(status)), Counter())


def _lost_of(attempt: Attempt, usage: GpuUsage, previous: Attempt | None) -> Counter[Reason]:
    lost: Counter[Reason] = Counter()
    if attempt.reason not in {None, Reason.PUBLISHED}:
        lost[attempt.reason] += usage.idle
    if previous is not None and previous.reason and previous.number == attempt.number - 1:
        lost[previous.reason] += usage.starting + usage.repeated
    return lost


def _with_rest(status: QLoRAJobStatus, usage: GpuUsage, lost: Counter[Reason]) -> Counter[Reason]:
    if status.phase is Phase.FAILED and status.reason is not None:
        lost[status.reason] += usage.held - lost.total()
    return lost
