"""Which checkpoint an attempt is told to resume from."""

from datetime import datetime, timedelta
from typing import Final

from qlora_api.v1alpha1 import Checkpoint, QLoRAJobStatus

LONGEST_SILENCE: Final = timedelta(minutes=10)
"""How long before its end an attempt may have reported last. It reports a checkpoint within a second and its progress
several times a minute; a node that dies is given up after five minutes at most."""


def reported_checkpoint(status: QLoRAJobStatus, number: int) -> Checkpoint | None:
    """Return the newest checkpoint that an earlier attempt reported, as the only one whose digest is known.

    None if the last attempt was not heard of, or not at its end: it may have written newer ones, and hours of training
    would be lost with them, each time if its reports never arrive.
    """
    earlier = [attempt for attempt in status.attempts if attempt.number < number and attempt.started_at]
    if status.checkpoint is None or not earlier or earlier[-1].started_at is None:
        return status.checkpoint
    heard = _heard_at(status, status.checkpoint)
    silent = heard < earlier[-1].started_at or _was_silent(heard, earlier[-1].finished_at)
    return None if silent else status.checkpoint


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
