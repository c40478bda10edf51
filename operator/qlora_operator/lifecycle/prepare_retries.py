"""Numbers and patience of preparations: which one is the current one, and for how long a failure is tried again.

All times are recorded once, in `status.preparation`; the age of the QLoRAJob decides nothing.
"""

from datetime import datetime, timedelta
from typing import Final

from qlora_api.names import MOST_PREPARATIONS
from qlora_api.reasons import REASONS, Domain, Reason
from qlora_api.v1alpha1 import Preparation, QLoRAJobStatus
from qlora_operator.lifecycle.context import startup_timeout
from qlora_operator.lifecycle.termination import parse_termination_message
from qlora_operator.models import ChildJob, Job, JobState, Observation

FIRST_PAUSE: Final = timedelta(seconds=15)
"""Back-off after the first failed preparation; it doubles up to LONGEST_PAUSE, and no GPU is held meanwhile."""
LONGEST_PAUSE: Final = timedelta(minutes=5)
_MOST_DOUBLINGS: Final = 20
"""More doublings than LONGEST_PAUSE allows, and few enough for a timedelta."""
PATIENCE: Final = timedelta(hours=6)
"""How long a failure of a service, a node or the cluster is tried again: long enough to wake somebody who mends it."""
SHORTEST_ABSENCE: Final = timedelta(minutes=10)
"""An operator that acts so much later was not there: no busy queue takes as long."""
UNEXPLAINED_TRIES: Final = 3
"""Failures in a row after which a pod without a termination message is no longer thought to have met a bad node."""
MOST_AVOIDED: Final = 8
"""Nodes that the next prepare pod would rather not run on, at most."""
_TRANSIENT: Final = frozenset(
    reason
    for reason, record in REASONS.items()
    if record.domain in {Domain.NODE, Domain.SERVICE, Domain.CLUSTER} and reason is not Reason.TRAINER_ERROR
)
"""Reasons of a prepare pod that are a failure of a service, a node or the cluster."""


def current_preparation(status: QLoRAJobStatus, children: Observation) -> Preparation:
    """Return the recorded preparation; a status that does not know the newest prepare Job follows that."""
    newest = children.prepare.attempt if children.prepare else 1
    recorded = status.preparation
    return recorded if recorded is not None and recorded.number >= newest else Preparation(number=newest)


def next_preparation(current: Preparation) -> Preparation:
    """Return another preparation that is needed, without the failures of this one."""
    return Preparation(number=min(current.number + 1, MOST_PREPARATIONS))


def next_try(failed: Preparation, now: datetime) -> Preparation:
    """Return a failed preparation that is tried again, with its failures; time without an operator is no patience."""
    late = absence(failed.retry_at, now)
    times = {name: _shift(getattr(failed, name), late, now) for name in ("missing_since", "failing_since")}
    return failed.model_copy(update={"number": failed.number + 1, "retry_at": None, **times})


def may_be_retried(reason: Reason) -> bool:
    """Return whether preparation can succeed later without another manifest."""
    return reason in _TRANSIENT or REASONS[reason].appears_late


def is_unexplained(prepare: ChildJob, state: JobState) -> bool:
    """Return whether the pod ended without a termination message, as after a signal or on a broken node."""
    end = prepare.pod.exit if prepare.pod else None
    return state.reason is Reason.TRAINER_ERROR and end is not None and parse_termination_message(end.message) is None


def count_failure(current: Preparation, prepare: ChildJob, state: JobState, now: datetime) -> Preparation:
    """Return the preparation with one more failure.

    What is missing keeps its time, whatever fails in between. The services answer if something is missing, so their
    next failure is a new one. Waiting for a queue or a node is not failing, nor is a failure that nobody saw for long.
    """
    late, waited = REASONS[state.reason].appears_late, _time_without_node(prepare) + _time_unseen(prepare, now)
    missing = _shift(current.missing_since, waited, now)
    failing = _shift(current.failing_since, waited, now)
    return current.model_copy(
        update={
            "failures": current.failures + 1,
            "unexplained": current.unexplained + 1 if is_unexplained(prepare, state) else 0,
            "reason": state.reason,
            "message": state.message,
            "missing_since": missing or (now if late else None),
            "failing_since": None if late else failing or now,
            "avoided_nodes": current.avoided_nodes if late else _avoid(current.avoided_nodes, prepare),
        }
    )


def _avoid(nodes: tuple[str, ...], prepare: ChildJob) -> tuple[str, ...]:
    """Return the nodes of the last failures; a node without a network looks like a service that is down."""
    node = prepare.pod.node if prepare.pod else ""
    return tuple(dict.fromkeys((*nodes, node) if node else nodes))[-MOST_AVOIDED:]


def _shift(since: datetime | None, by: timedelta, now: datetime) -> datetime | None:
    return min(since + by, now) if since is not None else None


def _time_without_node(prepare: ChildJob) -> timedelta:
    """Return how long the pod waited for its node; both times are the control plane's."""
    scheduled = prepare.pod.scheduled_at if prepare.pod else None
    return max(scheduled - prepare.created_at, timedelta(0)) if scheduled else timedelta(0)


def _time_unseen(prepare: ChildJob, now: datetime) -> timedelta:
    """Return for how long the Job has been marked as failed; both times are the control plane's."""
    return absence(prepare.failure.at if prepare.failure else None, now)


def absence(due: datetime | None, now: datetime) -> timedelta:
    """Return for how long no operator was there to do what was due; a busy one is a little late."""
    late = now - due if due is not None else timedelta(0)
    return late if late > SHORTEST_ABSENCE else timedelta(0)


def retry_time(job: Job, failed: Preparation, now: datetime) -> datetime | None:
    """Return when a failed preparation is tried again; None if the patience with it is over."""
    deadline = _deadline(job, failed)
    if deadline is None or now >= deadline or failed.number >= MOST_PREPARATIONS:
        return None
    if failed.unexplained >= UNEXPLAINED_TRIES:
        return None
    doublings = min(failed.failures - 1, _MOST_DOUBLINGS)
    # The last try is at the deadline.
    return min(now + min(FIRST_PAUSE * 2.0**doublings, LONGEST_PAUSE), deadline)


def describe_retries(job: Job, failed: Preparation) -> str:
    """Return how preparation failed, and until when it is tried again."""
    since, deadline = _since(failed), _deadline(job, failed)
    if since is None or deadline is None or failed.reason is Reason.TRAINER_ERROR:
        return f"{_sentence(failed)}; it is tried again"
    return f"{_sentence(failed)}; it is tried again until {format_until(since, deadline)}{_field(failed)}"


def format_until(since: datetime, deadline: datetime) -> str:
    """Return the end of a wait; with its date if that is another day than the start's."""
    return f"{deadline:%H:%M} UTC" if since.date() == deadline.date() else f"{deadline:%Y-%m-%d %H:%M} UTC"


def describe_end(failed: Preparation) -> str:
    """Return how preparation failed, and for how long it was tried."""
    since = _since(failed)
    if since is None or failed.failures == 1:
        return failed.message
    return (
        f"{_sentence(failed)}; {failed.failures} preparations failed, and it was tried again since "
        f"{since:%Y-%m-%d %H:%M} UTC{_field(failed)}"
    )


def _is_missing(failed: Preparation) -> bool:
    return failed.reason is not None and REASONS[failed.reason].appears_late


def _since(failed: Preparation) -> datetime | None:
    return failed.missing_since if _is_missing(failed) else failed.failing_since


def _deadline(job: Job, failed: Preparation) -> datetime | None:
    since = _since(failed)
    return since and since + (startup_timeout(job) if _is_missing(failed) else PATIENCE)


def _field(failed: Preparation) -> str:
    return " (spec.deadlines.startup)" if _is_missing(failed) else ""


def _sentence(failed: Preparation) -> str:
    return failed.message.rstrip(". \n")
