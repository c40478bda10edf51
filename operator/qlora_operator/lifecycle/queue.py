"""What a Job in a queue waits for, in the queue's own words."""

from datetime import datetime, timedelta
from typing import Final

from qlora_operator.lifecycle.exit_reasons import LONGEST_EVENT_LOOKUP
from qlora_operator.models import ChildJob, Job, Observation, Workload

FIRST_LOOKUP: Final = timedelta(seconds=5)
"""Kueue creates the Workload of a Job and tries to admit it within a second or two."""
WORKLOAD_CREATION_TIME: Final = timedelta(minutes=1)
"""Without a Workload after this time, Kueue does not manage the Job."""


def queued_jobs(children: Observation) -> tuple[str, ...]:
    """Return the Jobs of which a queue may say why they wait."""
    return tuple(child.name for child in children.jobs if child.suspended and not (child.finished or child.deleting))


def next_queue_lookup(child: ChildJob, now: datetime) -> datetime:
    """Return when to ask the queue again, ever later: Kueue changes nothing in the Job while it waits."""
    waited = now - (child.suspended_at or child.created_at)
    return now + min(max(waited, FIRST_LOOKUP), LONGEST_EVENT_LOOKUP)


def describe_wait(job: Job, child: ChildJob, sentence: str, now: datetime) -> str:
    """Return a sentence of the operator with what the queue says; what it said last as long as that is unknown."""
    if not (child.queue or job.spec.queue):
        return (
            f"spec.queue: Job {child.name} is suspended, and the run names no queue that could admit it; set "
            "spec.queue, or let the queue controller leave out this namespace"
        )
    if child.workload is None:
        last = job.status.message or ""
        return last if last.startswith(sentence) else sentence
    details = _describe(child, child.workload, now)
    return f"{sentence}: {details}" if details else sentence


def _describe(child: ChildJob, workload: Workload, now: datetime) -> str:
    """Return what a Workload waits for; the first thing that applies."""
    if not workload.kueue_served:
        return (
            "spec.queue: the cluster has no Kueue (it does not serve kueue.x-k8s.io), so nothing will admit it; install "
            "Kueue, or create a run without spec.queue"
        )
    if not workload.name:
        waited = now - (child.suspended_at or child.created_at)
        return _NO_WORKLOAD if waited >= WORKLOAD_CREATION_TIME else ""
    if not workload.active:
        why = f": {workload.evicted}" if workload.evicted else ""
        return f"Workload {workload.name} is deactivated{why}; to queue it again, set its spec.active to true"
    queue = f"queue {workload.queue or child.queue}"
    if workload.requeue_at is not None and workload.requeue_at > now and not workload.quota_reserved:
        return f"{queue}: {workload.pending or workload.evicted}; it is queued again at {workload.requeue_at:%H:%M:%S} UTC"
    if workload.admitted:
        return f"{queue} has admitted it, and Kueue is about to start it"
    if workload.quota_reserved and workload.checks:
        return f"{queue} has reserved quota, and these admission checks are not ready: {', '.join(workload.checks)}"
    return f"{queue}: {workload.pending}" if workload.pending else ""


_NO_WORKLOAD: Final = (
    "spec.queue: Kueue has created no Workload for it; let Kueue manage batch/job and this namespace, or create a run "
    "without spec.queue"
)
