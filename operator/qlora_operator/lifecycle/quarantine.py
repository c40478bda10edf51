"""Quarantine: which nodes no run uses for a while, because attempts of several runs ended there.

A failure is evidence against its node only where nothing else explains it: not what fails alike on most nodes, not what
only one namespace meets while others start pods on the node, not a container that did not start where another did. At
most half of the nodes are quarantined at a time.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Final, NamedTuple

from qlora_api.job_ref import JobRef
from qlora_api.reasons import Reason

QUARANTINE: Final = timedelta(hours=1)
"""How long no run uses a node after it ended attempts of several runs, and the time in which these count."""
LONGEST_QUARANTINE: Final = timedelta(hours=8)
"""Of a node that fails again each time that it is tried again: a night."""
QUARANTINE_RUNS: Final = 2
"""Runs of several namespaces whose attempts a node must end before it is quarantined; of one namespace only if the
kubelet reports the devices, or if the runs got further elsewhere."""
SIMILAR_RUNS: Final = 3
"""The same for runs of one namespace, which may share a mistake; and if some crashed without a word, which looks like a
bug of the trainer."""
BLAMELESS_NODES: Final = 3
"""A run whose attempts failed on so many nodes within QUARANTINE is the likelier cause, unless it got further since."""
MOST_BAD_NODES: Final = 3
"""More nodes that fail for the same reason within QUARANTINE have a common cause, such as a registry or a network, if
they are more than half of the nodes on which attempts began or failed meanwhile. In a cluster of few nodes half of
them is the limit."""
STARTUP_OVERLAP: Final = timedelta(minutes=10)
"""A container that did not start in time waited for at least so long; one of another run that started meanwhile shows
that the node was not the cause. Half an hour is the default of spec.deadlines.startup."""
_NOT_STARTED: Final = {
    Reason.STARTUP_DEADLINE_EXCEEDED: STARTUP_OVERLAP,
    Reason.IMAGE_PULL_FAILED: STARTUP_OVERLAP,
    Reason.POD_REJECTED: timedelta(0),
}
"""Reasons of an attempt whose container did not start, and for how long it was tried before."""


class NodeFailure(NamedTuple):
    """An attempt that ended because of its node."""

    run: JobRef
    node: str
    at: datetime
    reason: Reason
    recovered: bool = False
    """Whether the run got further elsewhere, which shows that it was not the cause."""
    hardware: bool = False
    """Whether the kubelet reports that the devices of the node failed, which no run can cause."""


class NodeStart(NamedTuple):
    """An attempt whose containers started: its node can start some."""

    node: str
    at: datetime
    run: JobRef | None = None


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
    started = [start for start in starts if is_recent(start.at, now)]
    starts_by_node: dict[str, list[NodeStart]] = {}
    for start in started:
        starts_by_node.setdefault(start.node, []).append(start)
    evidence = _find_evidence(recent, starts_by_node)
    ends = {
        node: _quarantine_end([failure for _, failure in same], starts_by_node.get(node, ()))
        for node, same in sorted(_grouped(evidence, lambda failure: failure.node).items())
    }
    found = {node: end for node, end in ends.items() if end is not None}
    known = {*starts_by_node, *(failure.node for failure in recent)}
    return _limited(found, evidence, len(known) // 2, now)


def _find_evidence(
    recent: Sequence[NodeFailure], starts_by_node: Mapping[str, Sequence[NodeStart]]
) -> list[NodeFailure]:
    """Return the failures that nothing but their node explains."""
    starts = ((start.at, start.node) for same in starts_by_node.values() for start in same)
    tried = sorted([*((failure.at, failure.node) for failure in recent), *starts])
    known = len({node for _, node in tried})
    tried_nodes = _count_near(tried, [failure.at for failure in recent])
    alike = _count_near_by(recent, lambda failure: failure.reason, lambda failure: failure.node)
    nodes_of_run = _count_near_by(recent, lambda failure: failure.run, lambda failure: failure.node)
    return [
        failure
        for number, failure in enumerate(recent)
        if alike[number] <= _most_alike(failure.reason, tried_nodes[number], known)
        if failure.recovered or (nodes_of_run[number] < BLAMELESS_NODES and failure.reason is not Reason.TRAINER_ERROR)
        if not any(_refutes(start, failure) for start in starts_by_node.get(failure.node, ()))
    ]


def _most_alike(reason: Reason, tried: int, known: int) -> float:
    """Return how many nodes may fail for the same reason without a common cause; a crash may be the trainer's bug."""
    return tried / 2 if reason is Reason.TRAINER_ERROR else max(min(MOST_BAD_NODES, known // 2), tried / 2)


def _refutes(start: NodeStart, failure: NodeFailure) -> bool:
    """Return whether a container started on the node after one did not, or, of another run, at the same time."""
    tried_for = _NOT_STARTED.get(failure.reason)
    if tried_for is None:
        return False
    return start.at > failure.at - (tried_for if start.run != failure.run else timedelta(0))


def _limited(
    ends: Mapping[str, datetime], evidence: Sequence[NodeFailure], limit: int, now: datetime
) -> dict[str, datetime]:
    """Leave out the nodes with the least evidence, if more than the limit are quarantined now."""
    runs = Counter(node for node, _ in {(failure.node, failure.run) for failure in evidence})
    current = sorted((node for node, end in ends.items() if now < end), key=lambda node: (-runs[node], node))
    left_out = set(current[limit:])
    return {node: end for node, end in ends.items() if node not in left_out}


def _quarantine_end(failures: Sequence[NodeFailure], starts: Sequence[NodeStart]) -> datetime | None:
    """Return until when a node that ended attempts is not used; None if too few runs were among them.

    A node that fails another run soon after its quarantine is still bad: it is not used for twice as long.
    """
    until, length, counted = None, QUARANTINE, set[JobRef]()
    for number, failure in enumerate(failures):
        near = [other for other in failures[: number + 1] if failure.at - other.at <= QUARANTINE]
        relapsed = until is not None and until <= failure.at <= until + QUARANTINE and failure.run not in counted
        if not (relapsed or _are_enough(near, starts)):
            continue
        length = min(2 * length, LONGEST_QUARANTINE) if relapsed else length
        until = max(until or failure.at, failure.at + length)
        counted |= {other.run for other in near}
    return until


def _are_enough(failures: Sequence[NodeFailure], starts: Sequence[NodeStart]) -> bool:
    """Return whether a node has ended attempts of enough runs, which have no more in common than the node."""
    runs = {failure.run for failure in failures}
    if len({failure.run for failure in failures if failure.hardware}) >= QUARANTINE_RUNS:
        return True
    if len({run.namespace for run in runs}) == 1 and _serves_others(failures, starts):
        return False
    if len(runs) >= SIMILAR_RUNS:
        return True
    explained = [failure for failure in failures if failure.reason is not Reason.TRAINER_ERROR]
    several_namespaces = len({failure.run.namespace for failure in explained}) > 1
    counted = {failure.run for failure in explained if several_namespaces or failure.recovered}
    return len(counted) >= QUARANTINE_RUNS


def _serves_others(failures: Sequence[NodeFailure], starts: Sequence[NodeStart]) -> bool:
    """Return whether containers of another namespace started on the node while those of one namespace failed."""
    since = min(failure.at for failure in failures) - QUARANTINE
    own = failures[0].run.namespace
    return any(start.run is not None and start.run.namespace != own and start.at >= since for start in starts)


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
