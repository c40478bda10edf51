"""The annotation qlora.dev/retry-requested-at: a failed run tries again from its checkpoint, once for each value.

A request is recorded in the status before it is carried out: with a CRD that does not know the field yet, nothing is
recorded, so nothing is repeated for ever.
"""

from datetime import datetime
from typing import Final

from qlora_api.names import RETRY_ANNOTATION, Phase
from qlora_api.reasons import Reason
from qlora_api.v1alpha1 import Attempt, Preparation, QLoRAJobStatus, RetryStatus
from qlora_operator.lifecycle.container_time import close_start
from qlora_operator.lifecycle.prepare_retries import next_preparation
from qlora_operator.lifecycle.retry_policy import AT_ONCE
from qlora_operator.models import Decision

_NO_EFFECT: Final = f"the annotation {RETRY_ANNOTATION} has no effect:"


def is_settled(status: QLoRAJobStatus, request: str | None) -> bool:
    """Return whether nothing is left to do for a value of the annotation."""
    if request is None:
        return not (status.retry and status.retry.pending)
    return status.retry is not None and status.retry.request == request and not status.retry.pending


def is_recorded(status: QLoRAJobStatus, request: str | None) -> bool:
    """Return whether the status has this value of the annotation; one that was removed needs no record."""
    return request is None or (status.retry is not None and status.retry.request == request)


def is_pending(status: QLoRAJobStatus, request: str | None) -> bool:
    """Return whether a recorded request is to be carried out now."""
    return request is not None and is_recorded(status, request) and bool(status.retry and status.retry.pending)


def record_request(status: QLoRAJobStatus, request: str | None) -> QLoRAJobStatus:
    """Return the status of a finished run with the request; that of a failed run is to be carried out."""
    return _with_request(status, request, pending=request is not None and status.phase is Phase.FAILED)


def note_request(status: QLoRAJobStatus, request: str | None) -> QLoRAJobStatus:
    """Return the status of a run with a request that was made before its end, and so has no effect."""
    return status if is_recorded(status, request) else _with_request(status, request, pending=False)


def _with_request(status: QLoRAJobStatus, request: str | None, *, pending: bool) -> QLoRAJobStatus:
    known = status.retry
    if known is None and request is None:
        return status
    former = known or RetryStatus(request=request or "")
    retry = former.model_copy(update={"request": former.request if request is None else request, "pending": pending})
    return status.model_copy(update={"retry": retry})


def describe_no_effect(status: QLoRAJobStatus) -> str:
    """Return why a request of a run that has not failed changes nothing, and what to do instead."""
    if status.phase is Phase.SUCCEEDED:
        return f"{_NO_EFFECT} the run has succeeded; to train again: qlora rerun --overwrite"
    return f"{_NO_EFFECT} the run has not ended; set another value if it fails"


def begin_retry(status: QLoRAJobStatus, now: datetime) -> tuple[QLoRAJobStatus, Decision]:
    """Return the status of a failed run from which it starts again, and the decision to prepare it.

    Attempts keep their numbers and history, and no longer count against budgets and deadlines. One without a recorded
    end ended with the run.
    """
    attempts = tuple(attempt if attempt.reason else _ended_with_run(attempt, status) for attempt in status.attempts)
    last = max((attempt.number for attempt in attempts), default=0)
    retry = status.retry and status.retry.model_copy(update={"pending": False, "after_attempt": last, "time": now})
    earlier = status.earlier_attempts and status.earlier_attempts.model_copy(update={"seconds": 0})
    # The image may be what was corrected; with another one, the run may get another digest and a new plan.
    plan = status.plan and status.plan.model_copy(update={"image": None, "image_pull_secrets": None})
    begun = status.model_copy(
        update={
            "attempts": attempts,
            "earlier_attempts": earlier,
            "forgiven_attempts": last or None,
            "plan": plan,
            "retry": retry,
        }
    )
    following, message = next_preparation(status.preparation or Preparation()), _describe_retry(status)
    decision = Decision(Phase.PREPARING, Reason.PREPARING, message, preparation=following, requeue_after=AT_ONCE)
    return begun, decision


def _ended_with_run(attempt: Attempt, status: QLoRAJobStatus) -> Attempt:
    end = {"reason": status.reason or Reason.TRAINER_ERROR, "finished_at": status.finished_at}
    return close_start(attempt, status.finished_at).model_copy(update=end)


def _describe_retry(status: QLoRAJobStatus) -> str:
    resumed = f"; training resumes from the checkpoint of step {status.checkpoint.step}" if status.checkpoint else ""
    return f"a retry was requested after {status.reason}: preparation runs again{resumed}"
