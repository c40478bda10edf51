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
from qlora_api.report import UNEXPLAINED_EXIT
from qlora_api.v1alpha1 import Attempt, Checkpoint
from qlora_api.v1alpha1.status import MAX_AVOIDED_NODES
from qlora_operator.lifecycle.budgets import domain_of

AVOIDANCE: Final = timedelta(minutes=10)
"""How long a run does not return to a node that ended its attempt: time for a driver or a kubelet to restart."""
QUARANTINE: Final = timedelta(hours=1)
"""How long no run uses a node after it ended attempts of several runs, and the time in which these count."""
LONGEST_QUARANTINE: Final = timedelta(hours=8)
"""Of a node that fails again each time that it is tried again: a night."""
QUARANTINE_RUNS: Final = 2
"""Runs whose attempts a node must end before it is quarantined."""
CRASHED_RUNS: Final = 3
"""The same if some of them crashed without a word, which looks like a bug of the trainer."""
BLAMELESS_NODES: Final = 3
"""A run whose attempts failed on so many nodes within QUARANTINE is the likelier cause, unless it got further since."""
MOST_BAD_NODES: Final = 3
"""More nodes that fail for the same reason within QUARANTINE have a common cause, such as a registry or a network, if
they are more than half of the nodes on which attempts began or failed meanwhile."""
_LEFT_NODE: Final = frozenset({Reason.NODE_LOST, Reason.INTERRUPTED})
"""A node that went down is empty when it comes back, so the scheduler would choose it again, sound or not."""


class NodeFailure(NamedTuple):
    """An attempt that ended because of its node."""

    run: JobRef
    node: str
    at: datetime
    reason: Reason
    recovered: bool = False
    """Whether the run got further elsewhere, which shows that it was not the cause."""


class NodeStart(NamedTuple):
    """An attempt whose containers started: its node can start some."""

    node: str
    at: datetime


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


def node_failures(
    run: JobRef, attempts: Sequence[Attempt], checkpoint: Checkpoint | None = None
) -> tuple[NodeFailure, ...]:
    """Return the failures of nodes that the attempts and the newest checkpoint of a run show."""
    published = any(attempt.reason is Reason.PUBLISHED for attempt in attempts)
    steps = (attempt.checkpoint_step or 0 for attempt in attempts)
    newest = max((*steps, checkpoint.step if checkpoint else 0))
    return tuple(
        NodeFailure(
            run, attempt.node, attempt.finished_at, attempt.reason, published or newest > (attempt.checkpoint_step or 0)
        )
        for attempt in attempts
        if attempt.finished_at is not None and attempt.reason is not None
        if is_blamed(attempt) or _crashed(attempt)
    )


def node_starts(attempts: Sequence[Attempt]) -> tuple[NodeStart, ...]:
    """Return the nodes on which the containers of a run started."""
    return tuple(
        NodeStart(attempt.node, attempt.started_at) for attempt in attempts if attempt.node and attempt.started_at
    )


def _crashed(attempt: Attempt) -> bool:
    """Return whether an attempt ended on its node without a termination message, as after a signal."""
    unexplained = attempt.reason is Reason.TRAINER_ERROR and UNEXPLAINED_EXIT in attempt.message
    return unexplained and bool(attempt.node) and domain_of(attempt) is Domain.NODE


def is_recent(at: datetime, now: datetime) -> bool:
    """Return whether a failure or a start may still decide about a quarantine."""
    return now < at + 2 * LONGEST_QUARANTINE


def quarantined_nodes(
    failures: Iterable[NodeFailure], now: datetime, starts: Iterable[NodeStart] = ()
) -> dict[str, datetime]:
    """Return the nodes that no run uses for now, and until when."""
    return {node: end for node, end in quarantine_ends(failures, now, starts).items() if now < end}


def quarantine_ends(
    failures: Iterable[NodeFailure], now: datetime, starts: Iterable[NodeStart] = ()
) -> dict[str, datetime]:
    """Return the nodes that were quarantined lately, and until when; it may have passed."""
    recent = sorted((failure for failure in failures if is_recent(failure.at, now)), key=lambda failure: failure.at)
    tried = [(failure.at, failure.node) for failure in recent]
    tried = sorted([*tried, *((start.at, start.node) for start in starts if is_recent(start.at, now))])
    tried_nodes = _count_near(tried, [failure.at for failure in recent])
    alike = _count_near_by(recent, lambda failure: failure.reason, lambda failure: failure.node)
    nodes_of_run = _count_near_by(recent, lambda failure: failure.run, lambda failure: failure.node)
    evidence = [
        failure
        for number, failure in enumerate(recent)
        if alike[number] <= _most_alike(failure.reason, tried_nodes[number])
        if failure.recovered or (nodes_of_run[number] < BLAMELESS_NODES and failure.reason is not Reason.TRAINER_ERROR)
    ]
    by_node = _grouped(evidence, lambda failure: failure.node)
    ends = {node: _quarantine_end([failure for _, failure in same]) for node, same in sorted(by_node.items())}
    return {node: end for node, end in ends.items() if end is not None}


def _quarantine_end(failures: Sequence[NodeFailure]) -> datetime | None:
    """Return until when a node that ended attempts is not used; None if too few runs were among them.

    A node that fails another run soon after its quarantine is still bad: it is not used for twice as long.
    """
    until, length, counted = None, QUARANTINE, set[JobRef]()
    for number, failure in enumerate(failures):
        near = [other for other in failures[: number + 1] if failure.at - other.at <= QUARANTINE]
        relapsed = until is not None and until <= failure.at <= until + QUARANTINE and failure.run not in counted
        if not (relapsed or _are_enough(near)):
            continue
        length = min(2 * length, LONGEST_QUARANTINE) if relapsed else length
        until = max(until or failure.at, failure.at + length)
        counted |= {other.run for other in near}
    return until


def _most_alike(reason: Reason, tried: int) -> float:
    """Return how many nodes may fail for the same reason without a common cause; a crash may be the trainer's bug."""
    return tried / 2 if reason is Reason.TRAINER_ERROR else max(MOST_BAD_NODES, tried / 2)


def _are_enough(failures: Sequence[NodeFailure]) -> bool:
    """Return whether a node has ended attempts of enough runs."""
    runs = {failure.run for failure in failures}
    explained = {failure.run for failure in failures if failure.reason is not Reason.TRAINER_ERROR}
    return len(explained) >= QUARANTINE_RUNS or len(runs) >= CRASHED_RUNS


def _grouped(
    failures: Sequence[NodeFailure], key: Callable[[NodeFailure], Hashable]
) -> dict[Any, list[tuple[int, NodeFailure]]]:
    """Return the failures with their positions, by a key, in the order that they have."""
    groups: dict[Any, list[tuple[int, NodeFailure]]] = {}
    for number, failure in enumerate(failures):
        groups.setdefault(key(failure), []).append((number, failure))
    return groups


def _count_near_by(
    failures: Sequence[NodeFailure], key: Callable[[NodeFailure], Hashable], value: Callable[[NodeFailure], Hashable]
) -> list[int]:
    """Return for each failure how many values the failures with its key have within QUARANTINE before or after it."""
    counts = [0] * len(failures)
    for same in _grouped(failures, key).values():
        near = _count_near([(failure.at, value(failure)) for _, failure in same], [failure.at for _, failure in same])
        for (number, _), found in zip(same, near, strict=True):
            counts[number] = found
    return counts


def _count_near(events: Sequence[tuple[datetime, Hashable]], moments: Sequence[datetime]) -> list[int]:
    """Return how many values there are within QUARANTINE before or after each moment; both are sorted by time."""
    counts: list[int] = []
    first = last = 0
    near: Counter[Hashable] = Counter()
    for moment in moments:
        while last < len(events) and events[last][0] - moment <= QUARANTINE:
            near[events[last][1]] += 1
            last += 1
        while moment - events[first][0] > QUARANTINE:
            near -= Counter([events[first][1]])  # drops what reaches zero
            first += 1
        counts.append(len(near))
    return counts


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


def next_release(attempts: Sequence[Attempt], quarantined: Mapping[str, datetime], now: datetime) -> datetime | None:
    """Return when a new attempt may use the next of the avoided nodes again."""
    return min(avoided_nodes(attempts, quarantined, now).values(), default=None)


def disliked_nodes(attempts: Sequence[Attempt]) -> tuple[str, ...]:
    """Return the nodes that may have ended attempts of the run: it uses them only if no other node fits."""
    nodes = dict.fromkeys(
        attempt.node
        for attempt in reversed(attempts)
        if attempt.node and (domain_of(attempt) is Domain.NODE or attempt.reason in _LEFT_NODE)
    )
    return tuple(sorted(list(nodes)[:MAX_AVOIDED_NODES]))


def find_released(attempt: Attempt, avoided: Mapping[str, datetime]) -> tuple[str, ...]:
    """Return the nodes that the pods of an attempt may not use, although a new attempt may."""
    return tuple(node for node in attempt.avoided_nodes or () if node not in avoided)
