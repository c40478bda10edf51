"""Node health: which nodes a new attempt avoids, computed from how attempts ended.

A node that ended an attempt is avoided by that run for a short time; one that ended attempts of several runs is
quarantined (`quarantine`), so that no run uses it, for a longer time. Both times end: a pod that found no other node by
then is replaced by one that may use it. A node is never excluded for ever, and no pod waits for ever because of this.
"""

import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Final

from qlora_api.job_ref import JobRef
from qlora_api.reasons import REASONS, Domain, Reason, RetryAction
from qlora_api.report import UNEXPLAINED_EXIT
from qlora_api.v1alpha1 import Attempt, Checkpoint
from qlora_api.v1alpha1.status import MAX_AVOIDED_NODES
from qlora_operator.lifecycle.budgets import domain_of
from qlora_operator.lifecycle.quarantine import NodeFailure, NodeStart

AVOIDANCE: Final = timedelta(minutes=10)
"""How long a run does not return to a node that ended its attempt: time for a driver or a kubelet to restart."""
_DEVICES_FAILED: Final = re.compile(r"Allocate failed due to |nvidia-container-cli: |NVML", re.IGNORECASE)
"""What only a device plugin or a driver says: in the kubelet's words, which no pod can write."""
_LEFT_NODE: Final = frozenset({Reason.NODE_LOST, Reason.INTERRUPTED, Reason.POD_REJECTED})
"""The scheduler would choose the node again, sound or not: one that went down is empty when it comes back, and one that
refused a pod for its topology looks as if it had room."""


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
            run,
            attempt.node,
            attempt.finished_at,
            attempt.reason,
            recovered=published or newest > (attempt.checkpoint_step or 0),
            hardware=attempt.reason is Reason.POD_REJECTED and bool(_DEVICES_FAILED.search(attempt.message)),
        )
        for attempt in attempts
        if attempt.finished_at is not None and attempt.reason is not None
        if is_blamed(attempt) or _crashed(attempt)
    )


def node_starts(run: JobRef, attempts: Sequence[Attempt]) -> tuple[NodeStart, ...]:
    """Return the nodes on which the containers of a run started."""
    return tuple(
        NodeStart(attempt.node, attempt.started_at, run) for attempt in attempts if attempt.node and attempt.started_at
    )


def _crashed(attempt: Attempt) -> bool:
    """Return whether an attempt ended on its node without a termination message, as after a signal."""
    unexplained = attempt.reason is Reason.TRAINER_ERROR and UNEXPLAINED_EXIT in attempt.message
    return unexplained and bool(attempt.node) and domain_of(attempt) is Domain.NODE


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
