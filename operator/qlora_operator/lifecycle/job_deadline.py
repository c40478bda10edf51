"""activeDeadlineSeconds of the child Jobs: set while a container runs, and absent while it waits.

Kubernetes counts it from status.startTime, so also while a pod waits for a node, and anew when a Job is resumed.
"""

from datetime import datetime, timedelta
from typing import Final

from qlora_api.names import Role
from qlora_api.v1alpha1 import Attempt
from qlora_operator.lifecycle.budgets import time_left
from qlora_operator.models import PREPARE_DEADLINE, ChildJob, Job

SAFETY_MARGIN: Final = timedelta(minutes=10)
"""By how much Kubernetes' deadline of a training Job is later than the operator's: it ends a run without operator."""
STOP_NOW: Final = 1
"""The smallest deadline. Kubernetes stops the pods, which write a checkpoint, and marks the Job as failed."""


def job_deadline(job: Job, child: ChildJob, attempts: tuple[Attempt, ...], now: datetime) -> int | None:
    """Return the activeDeadlineSeconds that a Job should have; None: none, because none of its containers runs."""
    if child.suspended or child.started_at is None:
        return None
    if child.role is Role.PREPARE:
        return _prepare_deadline(child, child.started_at)
    attempt = next((attempt for attempt in attempts if attempt.number == child.attempt), None)
    if attempt is None or attempt.running_since is None:
        return None
    limits = job.spec.deadlines
    if time_left(limits, job.status, attempts, now) <= timedelta(0):
        return STOP_NOW
    waited = max(attempt.running_since - child.started_at, timedelta(0))
    left = time_left(limits, job.status, attempts, attempt.running_since)
    return int((waited + left + SAFETY_MARGIN).total_seconds())


def _prepare_deadline(prepare: ChildJob, job_started: datetime) -> int | None:
    pod = prepare.pod
    if pod is None or pod.started_at is None:
        return None
    waited = max(pod.started_at, pod.scheduled_at or pod.started_at) - job_started
    return int((max(waited, timedelta(0)) + PREPARE_DEADLINE).total_seconds())
