"""How long the containers of an attempt ran, which spec.deadlines.total limits; waiting for a queue or a node is free.

A queue may suspend the Job of an attempt and resume it later: the attempt then starts more than once. The status keeps
when the current start began (`runningSince`) and what the ended ones took (`containerSeconds`).
"""

from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Final

from qlora_api.v1alpha1 import Attempt
from qlora_api.v1alpha1.status import MAX_CONTAINER_SECONDS
from qlora_operator.lifecycle.exit_reasons import deletion_end, is_abandoned
from qlora_operator.models import ChildJob, Pod

CLOCK_RESOLUTION: Final = timedelta(seconds=2)
"""By how much a difference of two times may be wrong that are each cut to whole seconds (Kubernetes API, Time)."""


def track_starts(
    attempt: Attempt, recorded: Attempt, train: ChildJob, heard_at: datetime | None, now: datetime
) -> Attempt:
    """Return an attempt with the times of its containers: as recorded, and as its Job and pods show.

    Args:
        attempt: The attempt without times.
        recorded: The attempt in the last status.
        train: Its Job.
        heard_at: When a pod of the run reported last.
        now: The current time.

    """
    started = [_container_start(pod, now) for pod in train.pods if pod.started_at is not None]
    since = None if train.suspended else min(started, default=None)
    if recorded.running_since is not None:
        if not _has_ended(recorded.running_since, train):
            since = recorded.running_since
        else:
            recorded = close_start(recorded, _suspended_at(train, heard_at, now))
    times = {
        "started_at": recorded.started_at or since,
        "running_since": since,
        "container_seconds": recorded.container_seconds,
    }
    return attempt.model_copy(update=times)


def _has_ended(since: datetime, train: ChildJob) -> bool:
    """Return whether the containers that started then have been stopped by a suspension of the Job."""
    if train.suspended or (train.earlier_pods and not train.pods):
        return True
    if not train.pods:
        return train.started_at is not None and since < train.started_at
    return since < min(pod.created_at or since for pod in train.pods)


def _suspended_at(train: ChildJob, heard_at: datetime | None, now: datetime) -> datetime | None:
    """Return when a Job was suspended, or the last sign of life if nobody saw that; None if there is neither."""
    requested = [pod.deletion_requested_at for pod in (*train.earlier_pods, *train.pods) if pod.deletion_requested_at]
    return train.suspended_at or min(requested, default=None) or (now if train.suspended else heard_at)


def close_start(attempt: Attempt, end: datetime | None) -> Attempt:
    """Return an attempt whose containers have stopped; without a known end, the start counts for nothing."""
    since = attempt.running_since
    if since is None:
        return attempt
    seconds = max((end or since) - since, timedelta(0)).total_seconds()
    total = min((attempt.container_seconds or 0) + int(seconds), MAX_CONTAINER_SECONDS)
    return attempt.model_copy(update={"running_since": None, "container_seconds": total})


def stop_counting(attempt: Attempt, heard_at: datetime | None, now: datetime) -> Attempt:
    """Return an attempt whose containers stopped at an unknown time: when a pod reported last, or now if none did."""
    return close_start(attempt, _last_known(attempt, heard_at, now))


def container_time(attempts: Iterable[Attempt], now: datetime) -> timedelta:
    """Return how long the containers of all attempts have run."""
    return sum((attempt.run_time(now) for attempt in attempts), timedelta(0))


def _container_start(pod: Pod, now: datetime) -> datetime:
    """Return when the container of a pod started, which its node's clock says: not before it had a node, nor later."""
    start, placed = pod.started_at or now, pod.scheduled_at or pod.created_at or pod.started_at or now
    return max(min(start, now), placed)


def container_end(train: ChildJob, attempt: Attempt, heard_at: datetime | None, now: datetime) -> datetime:
    """Return when the first trainer of a Job ended, as far as pods, Job or reports tell; it may have been long ago."""
    if ends := [end for pod in train.pods if (end := _container_end(pod, now)) is not None]:
        return min(ends)
    if train.finished_at is not None:
        return min(train.finished_at, now)
    return now if train.pods else _last_known(attempt, heard_at, now)


def _last_known(attempt: Attempt, heard_at: datetime | None, now: datetime) -> datetime:
    """Return when containers ran last of which nothing is left: when a pod reported last, or now if none did."""
    reported = attempt.running_since is not None and heard_at is not None and heard_at >= attempt.running_since
    return heard_at if heard_at is not None and reported else now


def _container_end(pod: Pod, now: datetime) -> datetime | None:
    """Return when the trainer of a pod ended, or at the latest; None if it runs, or if nothing tells."""
    if pod.exit is not None and pod.exit.finished_at is not None:
        return correct_end(pod, pod.exit.finished_at, now)
    if pod.released_at is not None:
        return min(pod.released_at, now)
    return deletion_end(pod) if is_abandoned(pod, now) else None


def correct_end(pod: Pod, end: datetime, now: datetime) -> datetime:
    """Correct a time of a pod by how far its node's clock was behind as its container started.

    If that leads into the future, the clock has been set meanwhile, and is right.
    """
    behind = _container_start(pod, now) - pod.started_at if pod.started_at else timedelta(0)
    corrected = end + max(behind, timedelta(0))
    return min(corrected if corrected <= now + CLOCK_RESOLUTION else max(end, _container_start(pod, now)), now)
