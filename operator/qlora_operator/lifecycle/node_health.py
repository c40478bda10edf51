"""Node health: which nodes a new attempt avoids, computed from how attempts ended.

A node that ended an attempt is avoided by that run for a short time; one that ended attempts of several runs is
quarantined, so that no run uses it, for a longer time. Both times end: a pod that found no other node by then is
replaced by one that may use it. A node is never excluded for ever, and no pod waits for ever because of this.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Final, NamedTuple

from qlora_api.job_ref import JobRef
from qlora_api.reasons import REASONS, Domain, Reason, RetryAction
from qlora_api.v1alpha1 import Attempt
from qlora_api.v1alpha1.status import MAX_AVOIDED_NODES
from qlora_operator.lifecycle.budgets import domain_of

AVOIDANCE: Final = timedelta(minutes=10)
"""How long a run does not return to a node that ended its attempt: time for a driver or a kubelet to restart."""
QUARANTINE: Final = timedelta(hours=1)
"""How long no run uses a node after it ended attempts of several runs, and the time in which these count."""
QUARANTINE_RUNS: Final = 2
"""Runs whose attempts a node must end before it is quarantined."""
BLAMELESS_NODES: Final = 3
"""A run whose attempts failed on so many nodes within QUARANTINE is the likelier cause: it is evidence against none."""

MOST_BAD_NODES: Final = 3
"""More nodes that fail for the same reason within QUARANTINE have a common cause, such as a registry or a network."""


class NodeFailure(NamedTuple):
    """An attempt that ended because of its node."""

    run: JobRef
    node: str
    at: datetime
    reason: Reason


def is_blamed(attempt: Attempt) -> bool:
    """Return whether the end of an attempt is evidence against its node; a bug of the trainer looks like none."""
    if attempt.reason is None or not attempt.node or domain_of(attempt) is not Domain.NODE:
        return False
    return _must_avoid(attempt) or REASONS[attempt.reason].cluster_fault


def _must_avoid(attempt: Attempt) -> bool:
    """Return whether the next attempt must not use the node of this one."""
    record = REASONS[attempt.reason] if attempt.reason else None
    must = record is not None and record.next_attempt is RetryAction.OTHER_NODE
    return must and bool(attempt.node) and domain_of(attempt) is Domain.NODE


def node_failures(run: JobRef, attempts: Sequence[Attempt]) -> tuple[NodeFailure, ...]:
    """Return the failures of nodes that the status of a run shows."""
    return tuple(
        NodeFailure(run, attempt.node, attempt.finished_at, attempt.reason)
        for attempt in attempts
        if attempt.finished_at is not None and attempt.reason is not None and is_blamed(attempt)
    )


def recent_failures(failures: Iterable[NodeFailure], now: datetime) -> tuple[NodeFailure, ...]:
    """Return the failures that may still decide about a quarantine."""
    return tuple(failure for failure in failures if now < failure.at + 2 * QUARANTINE)


def quarantined_nodes(failures: Iterable[NodeFailure], now: datetime) -> dict[str, datetime]:
    """Return the nodes that no run uses for now, and until when."""
    recent = recent_failures(failures, now)
    evidence = [failure for failure in recent if not _has_common_cause(failure, recent)]
    until: dict[str, datetime] = {}
    for failure in evidence:
        if _failed_runs(failure, evidence) >= QUARANTINE_RUNS and now < failure.at + QUARANTINE:
            until[failure.node] = max(until.get(failure.node, now), failure.at + QUARANTINE)
    return dict(sorted(until.items()))


def _has_common_cause(failure: NodeFailure, failures: Sequence[NodeFailure]) -> bool:
    """Return whether too many nodes failed at about the same time: for the same run, or for the same reason."""
    near = [f for f in failures if abs(f.at - failure.at) <= QUARANTINE]
    by_run = {f.node for f in near if f.run == failure.run}
    by_reason = {f.node for f in near if f.reason is failure.reason}
    return len(by_run) >= BLAMELESS_NODES or len(by_reason) > MOST_BAD_NODES


def _failed_runs(failure: NodeFailure, failures: Sequence[NodeFailure]) -> int:
    """Return how many runs failed on the node of a failure until then."""
    before = (f for f in failures if f.node == failure.node and timedelta(0) <= failure.at - f.at <= QUARANTINE)
    return len({f.run for f in before})


def avoided_nodes(
    attempts: Sequence[Attempt], quarantined: Mapping[str, datetime], now: datetime
) -> dict[str, datetime]:
    """Return the nodes that a new attempt must not use, and until when; at most MAX_AVOIDED_NODES."""
    own = {
        attempt.node: attempt.finished_at + AVOIDANCE
        for attempt in attempts
        if attempt.finished_at is not None and _must_avoid(attempt)
    }
    latest = {node: max(own.get(node, now), quarantined.get(node, now)) for node in {*own, *quarantined}}
    current = sorted((item for item in latest.items() if item[1] > now), key=lambda item: item[1])
    return dict(sorted(current[-MAX_AVOIDED_NODES:]))


def disliked_nodes(attempts: Sequence[Attempt]) -> tuple[str, ...]:
    """Return the nodes that may have ended attempts of the run: it uses them only if no other node fits."""
    nodes = dict.fromkeys(
        attempt.node for attempt in reversed(attempts) if attempt.node and domain_of(attempt) is Domain.NODE
    )
    return tuple(sorted(list(nodes)[:MAX_AVOIDED_NODES]))


def find_released(attempt: Attempt, avoided: Mapping[str, datetime]) -> tuple[str, ...]:
    """Return the nodes that the pods of an attempt may not use, although a new attempt may."""
    return tuple(node for node in attempt.avoided_nodes or () if node not in avoided)
