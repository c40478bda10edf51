"""From the spec, the last status and the children to where the run stands and what comes next.

Facts reach the status before anything relies on them, so a crash between any two writes loses nothing: a training Job
is created only when model, output and plan are on record. When a Job's termination message is lost, the prepare Job
is deleted, then the loss recorded, then the Job deleted, then prepared again: what prepare Job is there once the loss
is on record was made after it, which no comparison of the clocks of two machines could tell. That next prepare finds
the manifest if the result was published.
"""

from dataclasses import replace
from typing import Final

from qlora_api.names import TERMINAL, Phase, Role
from qlora_api.reasons import Reason
from qlora_api.v1alpha1 import QLoRAJobStatus
from qlora_operator.lifecycle.context import ReconcileContext, startup_timeout
from qlora_operator.lifecycle.gang import classify, deletion_deadline, is_busy
from qlora_operator.lifecycle.prepare_phase import follow_preparation
from qlora_operator.lifecycle.retry_policy import retry_at
from qlora_operator.lifecycle.suspend import suspend
from qlora_operator.lifecycle.train_phase import decide_lost, decide_published, follow_training, make_attempt
from qlora_operator.models import Action, ChildJob, Decision, Job, Observation
from qlora_planner.validation import Violation, check

_ENDED_BY_OPERATOR: Final = frozenset({Reason.HEARTBEAT_LOST, Reason.NODE_LOST, Reason.SUSPENDED_BY_USER})
"""Ends that the operator saw, and not Kubernetes, which may still run pods of such an attempt."""


def rejected(violations: tuple[Violation, ...]) -> Decision:
    """Fail for what only the user can correct."""
    return Decision(Phase.FAILED, violations[0].reason, "; ".join(violation.message for violation in violations))


def decide(job: Job, children: Observation, context: ReconcileContext) -> Decision:
    """Say where the run stands and what comes next."""
    if violations := check(job.spec):
        return rejected(violations)
    number = 1 + max((attempt.number for attempt in job.status.attempts if attempt.reason), default=0)
    return (
        _late_publication(job, children, number, context)
        or suspend(job, children, number, context)
        or _restart_preparation(job.status, children, number)
        or _follow_current_attempt(job, children, number, context)
        or _wait_for_earlier_attempts(job.status, children, number, context)
        or follow_preparation(job, children, number, context.now)
    )


def needs_gpu_nodes(job: Job, children: Observation) -> bool:
    """Return whether the next decision may be a plan that depends on the cluster's GPUs."""
    # The end of a pod is seen before its Job's.
    prepared = children.prepare is not None and not children.prepare.holds_resources
    trains = any(child.role is Role.TRAIN for child in children.jobs)
    return bool(job.spec.resources.gpus_per_node) and prepared and not trains


def is_terminal(status: QLoRAJobStatus) -> bool:
    """Whether the run is over for ever."""
    return status.phase in TERMINAL


def _late_publication(job: Job, children: Observation, number: int, context: ReconcileContext) -> Decision | None:
    """An attempt that was given up may publish before it ends."""
    for child in children.jobs:
        if child.role is Role.TRAIN and child.attempt < number:
            verdict = classify(child, startup_timeout(job), context.now)
            if decision := decide_published(verdict, make_attempt(job, child.attempt), context.now):
                return decision
    return None


def _restart_preparation(status: QLoRAJobStatus, children: Observation, number: int) -> Decision | None:
    """Delete Jobs that speak of a lost attempt, or that are being deleted; wait until they are gone.

    Whoever trains needs its prepare Job no more, so that anybody may delete that.
    """
    leaving = children.prepare is not None and children.prepare.deleting and children.train(number) is None
    if not leaving and not any(_is_lost(child, status) for child in children.jobs if child.role is Role.TRAIN):
        return None
    message = (
        "Jobs were deleted, or lost without a termination message; preparation runs again and finds what was published"
    )
    return Decision(Phase.PREPARING, Reason.PREPARING, message, Action.DELETE_ALL_JOBS)


def _is_lost(train: ChildJob, status: QLoRAJobStatus) -> bool:
    ends = {attempt.number: attempt.reason for attempt in status.attempts if attempt.reason}
    end = ends.get(train.attempt)
    return end is Reason.POD_LOST or (train.deleting and end is None)


def _follow_current_attempt(job: Job, children: Observation, number: int, context: ReconcileContext) -> Decision | None:
    """Follow the attempt under way; it is lost if it is on record as running, and nobody sees its Job."""
    if train := children.train(number):
        return follow_training(job, train, context)
    on_record = any(attempt.number == number for attempt in job.status.attempts)
    return decide_lost(make_attempt(job, number), context.now) if on_record else None


def _wait_for_earlier_attempts(
    status: QLoRAJobStatus, children: Observation, number: int, context: ReconcileContext
) -> Decision | None:
    """Let the pods of the attempts before end first, and a service recover."""
    given_up = {attempt.number for attempt in status.attempts if attempt.reason in _ENDED_BY_OPERATOR}
    earlier = [child for child in children.jobs if child.role is Role.TRAIN and child.attempt < number]
    unfinished = [child for child in earlier if not child.finished]
    waiting = Decision(Phase.SCHEDULING, status.reason or Reason.SCHEDULING, status.message or "")
    if any(child.attempt in given_up and not child.deleting for child in unfinished):
        return replace(waiting, action=Action.DELETE_RUNNING_JOBS)
    if any(child.attempt not in given_up or is_busy(child, context.now) for child in unfinished):
        return replace(waiting, requeue_at=max(filter(None, map(deletion_deadline, unfinished)), default=None))
    at = retry_at(status.attempts)
    return replace(waiting, requeue_at=at) if at is not None and context.now < at else None
