"""Node health: which nodes a new attempt avoids, computed from how attempts ended.

A node that ended an attempt is avoided by that run for a short time; one that ended attempts of several runs is
quarantined, so that no run uses it, for a longer time. Both times end: a pod that found no other node by then is
replaced by one that may use it. A node is never excluded for ever, and no pod waits for ever because of this.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Final, NamedTuple

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
    recent = sorted(recent_failures(failures, now), key=lambda failure: failure.at)
    blameless = _with_common_cause(recent, lambda failure: failure.run, BLAMELESS_NODES)
    blameless |= _with_common_cause(recent, lambda failure: failure.reason, MOST_BAD_NODES + 1)
    evidence = [failure for number, failure in enumerate(recent) if number not in blameless]
    until: dict[str, datetime] = {}
    for node, same in _grouped(evidence, lambda failure: failure.node).items():
        for number, (_, failure) in enumerate(same):
            runs = {f.run for _, f in same[: number + 1] if failure.at - f.at <= QUARANTINE}
            if len(runs) >= QUARANTINE_RUNS and now < failure.at + QUARANTINE:
                until[node] = failure.at + QUARANTINE
    return dict(sorted(until.items()))


def _grouped(
    failures: Sequence[NodeFailure], key: Callable[[NodeFailure], Hashable]
) -> dict[Any, list[tuple[int, NodeFailure]]]:
    """Return the failures with their positions, by a key, in the order that they have."""
    groups: dict[Any, list[tuple[int, NodeFailure]]] = {}
    for number, failure in enumerate(failures):
        groups.setdefault(key(failure), []).append((number, failure))
    return groups


def _with_common_cause(failures: Sequence[NodeFailure], key: Callable[[NodeFailure], Hashable], nodes: int) -> set[int]:
    """Return the positions of failures, sorted by time, near which so many nodes failed for the same key."""
    found: set[int] = set()
    for same in _grouped(failures, key).values():
        first = last = 0
        near: Counter[str] = Counter()
        for number, failure in same:
            while last < len(same) and same[last][1].at - failure.at <= QUARANTINE:
                near[same[last][1].node] += 1
                last += 1
            while failure.at - same[first][1].at > QUARANTINE:
                near -= Counter([same[first][1].node])  # drops what reaches zero
                first += 1
            if len(near) >= nodes:
                found.add(number)
    return found


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
