"""What a Job in a queue waits for, in the queue's own words."""

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Final

from qlora_api.names import KUEUE_GROUP
from qlora_operator.lifecycle.exit_reasons import LONGEST_EVENT_LOOKUP
from qlora_operator.models import ChildJob, Job, Observation, Workload

FIRST_LOOKUP: Final = timedelta(seconds=5)
"""Kueue creates the Workload of a Job and tries to admit it within a second or two."""
DEACTIVATED: Final = "The workload is deactivated"
"""What Kueue says if somebody has set spec.active to false, and not Kueue itself with a reason."""
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
    details, evicted = _describe(child, child.workload, now), child.workload.evicted
    said = not details or (evicted and evicted in sentence and details.endswith(evicted))
    return sentence if said else f"{sentence}: {details}"


def _without_kueue(_: ChildJob, workload: Workload, __: datetime) -> str | None:
    if workload.kueue_served:
        return None
    return (
        f"spec.queue: the cluster has no Kueue (it does not serve {KUEUE_GROUP}), so nothing will admit it; install "
        "Kueue, or create a run without spec.queue"
    )


def _without_workload(child: ChildJob, workload: Workload, now: datetime) -> str | None:
    if workload.name:
        return None
    if now < (child.suspended_at or child.created_at) + WORKLOAD_CREATION_TIME:
        return ""
    return (
        "spec.queue: Kueue has created no Workload for it; let Kueue manage batch/job and this namespace, or create a "
        "run without spec.queue"
    )


def _deactivated(_: ChildJob, workload: Workload, __: datetime) -> str | None:
    if workload.active:
        return None
    why = f": {workload.evicted}" if workload.evicted not in {"", DEACTIVATED} else ""
    return f"Workload {workload.name} is deactivated{why}; to queue it again, set its spec.active to true"


def _moving(child: ChildJob, workload: Workload, _: datetime) -> str | None:
    """Say nothing while a Job moves to another queue; Kueue follows within a second."""
    return "" if not workload.queue or workload.queue != child.queue else None


def _in_back_off(_: ChildJob, workload: Workload, now: datetime) -> str | None:
    if workload.requeue_at is None or workload.requeue_at <= now or workload.quota_reserved:
        return None
    why = workload.pending or workload.evicted
    return f"{_queue(workload)}: {why}; it is queued again at {workload.requeue_at:%H:%M:%S} UTC"


def _evicted(_: ChildJob, workload: Workload, __: datetime) -> str | None:
    """Say who takes its quota; Kueue keeps the quota reserved until its pods have ended."""
    being_evicted = workload.evicted and workload.quota_reserved
    return f"{_queue(workload)}: {workload.evicted}" if being_evicted else None


def _admitted(_: ChildJob, workload: Workload, __: datetime) -> str | None:
    return f"{_queue(workload)} has admitted it, and Kueue is about to start it" if workload.admitted else None


def _checked(_: ChildJob, workload: Workload, __: datetime) -> str | None:
    if not (workload.quota_reserved and workload.checks):
        return None
    checks = ", ".join(workload.checks)
    return f"{_queue(workload)} has reserved quota, and these admission checks are not ready: {checks}"


def _pending(_: ChildJob, workload: Workload, __: datetime) -> str | None:
    return f"{_queue(workload)}: {workload.pending}" if workload.pending else None


def _queue(workload: Workload) -> str:
    return f"queue {workload.queue}"


_WAITS: Final[tuple[Callable[[ChildJob, Workload, datetime], str | None], ...]] = (
    _without_kueue,
    _without_workload,
    _deactivated,
    _moving,
    _in_back_off,
    _evicted,
    _admitted,
    _checked,
    _pending,
)
"""What a Job in a queue may wait for; the first that applies is said."""


def _describe(child: ChildJob, workload: Workload, now: datetime) -> str:
    return next((text for wait in _WAITS if (text := wait(child, workload, now)) is not None), "")
