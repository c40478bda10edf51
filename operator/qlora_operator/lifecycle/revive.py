"""Continues a failed run in place, from its last checkpoint, once a limit of the spec that it exceeded was raised."""

from datetime import datetime

from qlora_api.names import Phase
from qlora_api.reasons import REASONS, Domain, Reason
from qlora_api.v1alpha1 import Preparation, RetryLimits, to_timedelta
from qlora_operator.lifecycle.budgets import domain_of, find_exhausted, time_left
from qlora_operator.lifecycle.prepare_retries import next_preparation
from qlora_operator.lifecycle.retry_policy import AT_ONCE
from qlora_operator.lifecycle.train_phase import DEADLINE_TOLERANCE
from qlora_operator.models import Decision, Job


def retry_limits(job: Job) -> RetryLimits:
    """Return the limits of the spec, to record them when a run fails."""
    deadlines = job.spec.deadlines
    return RetryLimits(max_attempts=job.spec.retries.max_attempts, total=deadlines.total, startup=deadlines.startup)


def revive(job: Job, now: datetime) -> Decision | None:
    """Return the decision to continue a failed run if the limit that it exceeded was raised, else None."""
    raised = _raised_field(job, now)
    if job.status.phase is not Phase.FAILED or raised is None:
        return None
    attempts = job.status.attempts
    last = attempts[-1] if attempts else None
    # What nodes, services and the cluster took has no limit in the spec: raising maxAttempts grants all of it again,
    # and so does a later deadline for what they did not start in time.
    forgive = job.status.reason is Reason.RETRIES_EXHAUSTED and last is not None and domain_of(last) is not Domain.RUN
    forgiven = last.number if forgive and last else job.status.forgiven_attempts
    status = job.status.model_copy(update={"forgiven_attempts": forgiven})
    if attempts and find_exhausted(job.spec, status, attempts, now):
        return None
    return continue_run(job, f"{raised} was raised", forgiven, now)


def continue_run(job: Job, why: str, forgiven: int | None, now: datetime) -> Decision:
    """Return the decision that continues a failed run; a run that never had a plan prepares again."""
    if job.status.plan is None:
        message = f"{why}; preparation runs again"
        following = next_preparation(job.status.preparation or Preparation())
        return Decision(Phase.PREPARING, Reason.PREPARING, message, preparation=following, requeue_after=AT_ONCE)
    message = f"{why}; the next attempt resumes from the last checkpoint"
    return Decision(Phase.SCHEDULING, Reason.SCHEDULING, message, forgiven_attempts=forgiven, requeue_at=now)


def _raised_field(job: Job, now: datetime) -> str | None:
    """Return the field that allows more than when the run failed, and that could have ended it."""
    before, deadlines = job.status.retry_limits, job.spec.deadlines
    match job.status.reason:
        case Reason.RETRIES_EXHAUSTED if before and job.spec.retries.max_attempts > before.max_attempts:
            return "spec.retries.maxAttempts"
        case Reason.RETRIES_EXHAUSTED if (
            before and _is_longer(deadlines.startup, before.startup) and _never_started(job)
        ):
            return "spec.deadlines.startup"
        case Reason.DEADLINE_EXCEEDED if (
            before and _is_longer(deadlines.total, before.total) and _ran_out(job, before, now)
        ):
            return "spec.deadlines.total"
        case reason if _waited_for_startup(reason) and before and _is_longer(deadlines.startup, before.startup):
            return "spec.deadlines.startup"
        case _:
            return None


def _ran_out(job: Job, before: RetryLimits, now: datetime) -> bool:
    """Return whether the attempts used up what they had; a preparation has an hour of its own, which is fixed."""
    deadlines = job.spec.deadlines.model_copy(update={"total": before.total})
    return time_left(deadlines, job.status, job.status.attempts, now) <= DEADLINE_TOLERANCE


def _waited_for_startup(reason: Reason | None) -> bool:
    return reason is Reason.STARTUP_DEADLINE_EXCEEDED or (reason is not None and REASONS[reason].appears_late)


def _never_started(job: Job) -> bool:
    """Return whether the budget of the nodes was spent by pods that did not start in time."""
    last = job.status.attempts[-1] if job.status.attempts else None
    return last is not None and last.reason in {Reason.STARTUP_DEADLINE_EXCEEDED, Reason.IMAGE_PULL_FAILED}


def _is_longer(duration: str, other: str) -> bool:
    return to_timedelta(duration) > to_timedelta(other)
