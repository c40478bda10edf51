"""Retry budgets: how many attempts each fault domain may end, and how long to wait before the next one.

A checkpoint that is further than the last one refills every budget: only attempts since the one that wrote it count.
"""

import re
from collections.abc import Collection, Sequence
from datetime import datetime, timedelta
from typing import Final, NamedTuple
from zlib import crc32

from qlora_api.escapes import escape_line
from qlora_api.reasons import REASONS, Domain, Reason
from qlora_api.report import UNEXPLAINED_EXIT
from qlora_api.units import format_duration
from qlora_api.v1alpha1 import Attempt, DeadlinesSpec, QLoRAJobSpec, QLoRAJobStatus, to_timedelta
from qlora_api.v1alpha1.status import MAX_ATTEMPT_MESSAGE
from qlora_operator.lifecycle.container_time import container_time
from qlora_planner.validation import Violation

LONGEST_WAIT: Final = timedelta(days=3650)
"""Cap on durations: 9999999d is valid, but adding it to a date would overflow."""
MAX_NODE_ATTEMPTS: Final = 6
"""Attempts in a row that nodes may end; the pauses between them, 25 minutes, outlast a node's reboot."""
MAX_LOST_ATTEMPTS: Final = 3
"""Jobs in a row that may disappear without a termination message: something keeps deleting them."""
PATIENCE: Final = timedelta(hours=6)
"""Longest sum of the pauses for a service or for the cluster: a night's outage, and far more than an upgrade."""
LONGEST_PAUSE: Final = timedelta(minutes=10)
REPEATED_ERRORS: Final = 3
"""The same error of the trainer so many times, or on two nodes, is not the node's."""


class Backoff(NamedTuple):
    """The pauses before the next attempt, each twice as long as the one before."""

    first: timedelta
    immediate: int = 0
    """Attempts that are followed at once."""
    longest: timedelta = LONGEST_PAUSE

    def pause(self, count: int) -> timedelta:
        """Return the pause after so many attempts."""
        if count <= self.immediate:
            return timedelta(0)
        return min(self.first * 2.0 ** min(count - self.immediate - 1, 20), self.longest)


BACKOFFS: Final = {
    Domain.NODE: Backoff(timedelta(minutes=1)),
    Domain.SERVICE: Backoff(timedelta(seconds=10)),
    Domain.CLUSTER: Backoff(timedelta(seconds=10), immediate=1),
}
"""By domain; an attempt that the run itself ended is followed at once, because the next one differs."""
PARTLY_PLACED: Final = Backoff(timedelta(minutes=2))
"""For a gang of which only some pods got a node in time; other runs need time to take what it gave back."""
PARTLY_CREATED: Final = Backoff(timedelta(minutes=10), longest=timedelta(hours=1))
"""For a gang of which the API server refused some pods: until a quota has room, each attempt holds nodes in vain."""
_BACKOFFS_OF_GANGS: Final = {
    Reason.STARTUP_DEADLINE_EXCEEDED: PARTLY_PLACED,
    Reason.POD_REJECTED: PARTLY_CREATED,
}
"""By reason of an attempt whose gang lacked pods."""
_VARIABLE: Final = re.compile(r"0x[0-9a-f]+|\d+")
"""Addresses and numbers, in which two messages about the same error differ."""


def domain_of(attempt: Attempt) -> Domain | None:
    """Return where the cause of an attempt's end lies; None if nothing failed."""
    return attempt.domain or (REASONS[attempt.reason].domain if attempt.reason else None)


def since_progress(attempts: Sequence[Attempt], forgiven: int | None = None) -> tuple[Attempt, ...]:
    """Return the ended attempts that count: from the one that wrote the newest checkpoint.

    One that was replaced while it waited, because a node may be used again, has only waited.
    """
    start, newest = 0, 0
    for index, attempt in enumerate(attempts):
        if (attempt.checkpoint_step or 0) > newest:
            start, newest = index, attempt.checkpoint_step or 0
    return tuple(
        attempt
        for attempt in attempts[start:]
        if attempt.reason and attempt.number > (forgiven or 0) and attempt.reason is not Reason.UNSCHEDULABLE
    )


def pause_after(domain: Domain | None, count: int) -> timedelta:
    """Return the pause after so many attempts of one domain."""
    backoff = BACKOFFS.get(domain) if domain else None
    return backoff.pause(count) if backoff else timedelta(0)


def _pause_after_attempt(attempt: Attempt, count: int) -> timedelta:
    """Return the pause after an attempt, the given one of its domain since the last checkpoint.

    Two gangs that each got a part of the nodes would meet again after the same pause, so theirs differ by their names.
    """
    domain = domain_of(attempt)
    backoff = _BACKOFFS_OF_GANGS.get(attempt.reason) if attempt.reason and attempt.lacking_pods else None
    if backoff is None:
        return pause_after(domain, count)
    return backoff.pause(count) * (0.5 + crc32(attempt.job.encode()) / 2**32)


def retry_at(attempts: Sequence[Attempt], forgiven: int | None = None) -> datetime | None:
    """Return when the back-off before the next attempt ends; None if there is none."""
    counted = since_progress(attempts, forgiven)
    last = counted[-1] if counted else None
    if last is None or last.finished_at is None:
        return None
    pause = _pause_after_attempt(last, len(_of_domain(counted, domain_of(last))))
    return last.finished_at + pause if pause else None


def find_exhausted(
    spec: QLoRAJobSpec,
    status: QLoRAJobStatus,
    attempts: Sequence[Attempt],
    now: datetime,
    bad_nodes: Collection[str] = (),
) -> Violation | None:
    """Return which budget leaves no other attempt after these, how it was spent, and what the next step is.

    An attempt on a node that is known to be bad says nothing about the run; it is only waited for.
    """
    counted = since_progress(attempts, status.forgiven_attempts)
    only_waited = bool(attempts) and attempts[-1].reason is Reason.UNSCHEDULABLE
    if counted and not only_waited and (violation := _exhausted_domain(spec, counted, bad_nodes)):
        return violation
    if time_left(spec.deadlines, status, attempts, now) <= timedelta(0):
        message = f"all attempts together exceeded {spec.deadlines.total} (spec.deadlines.total)"
        return Violation(Reason.DEADLINE_EXCEEDED, message)
    return None


def time_left(
    deadlines: DeadlinesSpec, status: QLoRAJobStatus, attempts: Sequence[Attempt], now: datetime
) -> timedelta:
    """Return what the containers of all attempts left of spec.deadlines.total; negative if they exceeded it.

    A retry that somebody requested starts with all of it.
    """
    retried_after = status.retry.after_attempt if status.retry else 0
    earlier = status.earlier_attempts.seconds if status.earlier_attempts else 0
    counted = [attempt for attempt in attempts if attempt.number > retried_after]
    spent = container_time(counted, now) + timedelta(seconds=earlier)
    return min(to_timedelta(deadlines.total), LONGEST_WAIT) - spent


def _of_domain(counted: Sequence[Attempt], domain: Domain | None) -> list[Attempt]:
    return [attempt for attempt in counted if domain_of(attempt) is domain]


def _exhausted_domain(spec: QLoRAJobSpec, counted: Sequence[Attempt], bad_nodes: Collection[str]) -> Violation | None:
    last = counted[-1]
    domain = domain_of(last)
    same = _of_domain(counted, domain)
    since = f" since the checkpoint of step {last.checkpoint_step}" if last.checkpoint_step else ""
    if domain is Domain.RUN and len(same) >= (limit := spec.retries.max_attempts):
        message = f"{len(same)} of {limit} attempts (spec.retries.maxAttempts) failed{since}"
        return Violation(Reason.RETRIES_EXHAUSTED, message)
    if domain is Domain.NODE and (violation := _exhausted_nodes(same, since, bad_nodes)):
        return violation
    return _exhausted_patience(same, since)


def _exhausted_nodes(same: Sequence[Attempt], since: str, bad_nodes: Collection[str]) -> Violation | None:
    """Return that other nodes do not help: they have failed too often, or all in the same way."""
    repeated = [attempt for attempt in same if _is_same_error(attempt, same[-1])]
    nodes = sorted({attempt.node for attempt in repeated if attempt.node})
    if len(nodes) > 1 or len(repeated) >= REPEATED_ERRORS:
        message = f"{len(repeated)} attempts ended with the same error on {' and '.join(nodes) or 'their nodes'}"
        return Violation(Reason.TRAINER_ERROR, message)
    unexplained = [attempt for attempt in same if attempt.node not in bad_nodes]
    if len(unexplained) < MAX_NODE_ATTEMPTS:
        return None
    nodes = sorted({attempt.node for attempt in unexplained if attempt.node})
    where = f"on {', '.join(nodes)}" if nodes else "before they had a node"
    message = f"{len(unexplained)} attempts failed {where}{since}, the most that nodes may end without a new checkpoint"
    return Violation(Reason.RETRIES_EXHAUSTED, message)


def _is_same_error(attempt: Attempt, last: Attempt) -> bool:
    """Return whether the trainer reported the same error; an exit that it did not explain is never the same."""
    if attempt.reason is not Reason.TRAINER_ERROR or UNEXPLAINED_EXIT in attempt.message:
        return False
    return _without_variables(attempt.message) == _without_variables(last.message)


def _without_variables(message: str) -> str:
    # As the status keeps it, which all but the last of the compared messages come from.
    return _VARIABLE.sub("#", escape_line(message)[:MAX_ATTEMPT_MESSAGE])


def _exhausted_patience(same: Sequence[Attempt], since: str) -> Violation | None:
    """Return that waiting for a service, or for the cluster, has taken long enough."""
    losses = sum(attempt.reason is Reason.POD_LOST for attempt in same)
    if same and same[-1].reason is Reason.POD_LOST and losses >= MAX_LOST_ATTEMPTS:
        message = f"{losses} attempts disappeared without a termination message{since}"
        return Violation(Reason.POD_LOST, f"{message}; find out what deletes Jobs or pods in this namespace")
    waited = sum((_pause_after_attempt(attempt, count) for count, attempt in enumerate(same, 1)), timedelta(0))
    if waited <= PATIENCE:
        return None
    reasons = ", ".join(dict.fromkeys(str(attempt.reason) for attempt in same))
    patience = format_duration(int(PATIENCE.total_seconds()))
    message = f"{len(same)} attempts ended with {reasons}{since}; the next pause would exceed {patience} of waiting"
    return Violation(Reason.RETRIES_EXHAUSTED, message)
