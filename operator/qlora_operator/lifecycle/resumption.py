"""Which checkpoint an attempt is told to resume from."""

from qlora_api.v1alpha1 import Checkpoint, QLoRAJobStatus


def reported_checkpoint(status: QLoRAJobStatus, number: int) -> Checkpoint | None:
    """Return the newest checkpoint that an earlier attempt reported, as the only one whose digest is known.

    None if the last attempt ran without being heard of: it may have written newer ones, and to lose them each time
    would end a run whose reports never arrive.
    """
    checkpoint = status.checkpoint
    started = [attempt.started_at for attempt in status.attempts if attempt.number < number and attempt.started_at]
    if checkpoint is None or not started:
        return checkpoint
    reported = status.last_report.updated_at if status.last_report else checkpoint.time
    return checkpoint if max(reported, checkpoint.time) >= started[-1] else None
