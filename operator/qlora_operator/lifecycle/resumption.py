"""What an attempt is told of earlier ones: which checkpoint to resume from, and which results are the run's own."""

import sys
from datetime import datetime, timedelta
from typing import Final

from qlora_api.v1alpha1 import Attempt, Checkpoint, ManifestRef, QLoRAJobSpec, QLoRAJobStatus

LONGEST_SILENCE: Final = timedelta(minutes=10)
"""How long before its end an attempt may have reported last. It reports a checkpoint within a second and its progress
several times a minute; a node that dies is given up after five minutes at most."""


def reported_checkpoint(status: QLoRAJobStatus, number: int) -> Checkpoint | None:
    """Return the newest checkpoint that an earlier attempt reported, as the only one whose digest is known.

    None if the last attempt was not heard of, or not at its end: it may have written newer ones, and hours of training
    would be lost with them, each time if its reports never arrive.
    """
    if status.checkpoint is None:
        return None
    last = _last_started(status, number)
    return status.checkpoint if last is None or _was_heard(last, _heard_at(status, status.checkpoint)) else None


def reported_manifests(
    spec: QLoRAJobSpec, status: QLoRAJobStatus, number: int = sys.maxsize
) -> tuple[ManifestRef, ...] | None:
    """Return the manifests that earlier attempts reported; None if any in the output is to be believed.

    Whoever can write the output can add a result while a run trains. Before its first attempt a result is that of an
    equal run, unless the run is to replace such results. An attempt that was not heard of may have published.
    """
    output, last = status.output, _last_started(status, number)
    known = (output.manifest,) if output and output.manifest else ()
    if last is None:
        return known if spec.output.if_exists == "Overwrite" else None
    times = (status.last_report.updated_at if status.last_report else None, _checkpoint_time(status))
    heard = max((time for time in times if time is not None), default=None)
    return known if heard is not None and _was_heard(last, heard) else None


def _last_started(status: QLoRAJobStatus, number: int) -> Attempt | None:
    """Return the last attempt before a number whose container started."""
    started = [attempt for attempt in status.attempts if attempt.number < number and attempt.started_at]
    return started[-1] if started else None


def _was_heard(attempt: Attempt, heard_at: datetime) -> bool:
    """Return whether a report of an attempt arrived near its end."""
    since = attempt.started_at or heard_at
    return heard_at >= since and not _was_silent(heard_at, attempt.finished_at)


def _checkpoint_time(status: QLoRAJobStatus) -> datetime | None:
    return status.checkpoint.time if status.checkpoint else None


def checkpoint_of_restart(status: QLoRAJobStatus, suspended_at: datetime | None) -> Checkpoint | None:
    """Return the newest checkpoint of an attempt whose Job was suspended and will resume; None as above."""
    if status.checkpoint is None or _was_silent(_heard_at(status, status.checkpoint), suspended_at):
        return None
    return status.checkpoint


def _heard_at(status: QLoRAJobStatus, checkpoint: Checkpoint) -> datetime:
    reported = status.last_report.updated_at if status.last_report else checkpoint.time
    return max(reported, checkpoint.time)


def _was_silent(heard_at: datetime, ended_at: datetime | None) -> bool:
    return ended_at is not None and ended_at - heard_at > LONGEST_SILENCE
