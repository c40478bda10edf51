"""Jobs that outlive what they were for: a sidecar, a hanging process or a dead node keeps them from finishing."""

from datetime import datetime, timedelta
from typing import Final

from qlora_api.names import TERMINAL, Phase, Role
from qlora_api.reasons import Reason
from qlora_api.v1alpha1 import QLoRAJobStatus
from qlora_operator.models import ChildJob, Observation

END_GRACE: Final = timedelta(seconds=30)
"""What a Job gets to finish by itself once its trainer has ended; peers and sidecars stop within the default grace
period of a pod, 30 s. A Job that has finished holds nothing, and is kept for its logs."""
ENDED_BY_OPERATOR: Final = frozenset({
    Reason.HEARTBEAT_LOST,
    Reason.NODE_LOST,
    Reason.POD_LOST,
    Reason.SUSPENDED_BY_USER,
    Reason.STARTUP_DEADLINE_EXCEEDED,
    Reason.IMAGE_PULL_FAILED,
    Reason.POD_REJECTED,
    Reason.UNSCHEDULABLE,
})  # fmt: skip
"""Reasons with which the operator ended an attempt, not its pods: they may wait or run, and are stopped at once."""


def leftover_jobs(status: QLoRAJobStatus, children: Observation, now: datetime) -> tuple[ChildJob, ...]:
    """Return the Jobs to delete, because they run although what they were for has ended."""
    return tuple(child for child in children.jobs if (due := _due(status, children, child)) is not None and due <= now)


def next_leftover(status: QLoRAJobStatus, children: Observation, now: datetime) -> datetime | None:
    """Return when the next Job will have outlived what it was for."""
    moments = [due for child in children.jobs if (due := _due(status, children, child)) is not None and due > now]
    return min(moments, default=None)


def _due(status: QLoRAJobStatus, children: Observation, child: ChildJob) -> datetime | None:
    """Return from when on a Job is a leftover; None if it is needed, has finished, or is being deleted."""
    if child.finished or child.deleting:
        return None
    if status.phase is Phase.FAILED and child.holds_resources:
        return child.created_at
    if child.role is Role.PREPARE:
        return _due_prepare(status, children, child)
    attempt = next((attempt for attempt in status.attempts if attempt.number == child.attempt), None)
    if attempt is not None and attempt.reason in ENDED_BY_OPERATOR:
        return child.created_at
    # The peers of a gang end before its main process has published: an attempt's end is that of the first of them.
    ended_at = _finished_at(status) or (attempt.finished_at if attempt is not None and attempt.reason else None)
    return ended_at + END_GRACE if ended_at is not None else None


def _due_prepare(status: QLoRAJobStatus, children: Observation, prepare: ChildJob) -> datetime | None:
    """Return from when on a prepare Job whose trainer has ended is a leftover: training needs it to start only."""
    if prepare.holds_resources:
        return None
    trains = [child.created_at for child in children.jobs if child.role is Role.TRAIN]
    needed_until = _finished_at(status) or min((at for at in trains if at >= prepare.created_at), default=None)
    return needed_until + END_GRACE if needed_until is not None else None


def _finished_at(status: QLoRAJobStatus) -> datetime | None:
    return status.finished_at if status.phase in TERMINAL else None
