"""Decides the next phase and action, from the spec, the last status and the children.

Facts are written to the status before anything relies on them, so a crash between any two writes loses nothing: a
training Job is created only when model, output and plan are in the status. When a Job's termination message is lost,
the prepare Job is deleted, then the loss is recorded, then the Job is deleted, then prepare runs again. This order
proves that a prepare Job that exists once the loss is recorded is newer than the loss, without comparing the clocks of
two machines. The new prepare finds the manifest if the result was published.
"""

from dataclasses import replace
from typing import Final

from qlora_api.names import TERMINAL, Phase, Role
from qlora_api.reasons import Reason
from qlora_api.v1alpha1 import QLoRAJobStatus
from qlora_operator.lifecycle.context import ReconcileContext
from qlora_operator.lifecycle.gang import classify_child, deletion_deadline, is_busy
from qlora_operator.lifecycle.prepare_phase import follow_preparation
from qlora_operator.lifecycle.retry_policy import retry_at
from qlora_operator.lifecycle.retry_request import budgeted_attempts
from qlora_operator.lifecycle.suspend import suspend
from qlora_operator.lifecycle.train_phase import decide_lost, decide_published, follow_training, make_attempt
from qlora_operator.models import Action, ChildJob, Decision, Job, Observation
from qlora_planner.validation import Violation, check

_ENDED_BY_OPERATOR: Final = frozenset({Reason.HEARTBEAT_LOST, Reason.NODE_LOST, Reason.SUSPENDED_BY_USER})
"""Reasons with which the operator, not Kubernetes, ended an attempt; its pods may still run."""


def rejected(violations: tuple[Violation, ...]) -> Decision:
    """Fail with the violations of a spec, which only the user can correct."""
    return Decision(Phase.FAILED, violations[0].reason, "; ".join(violation.message for violation in violations))


def decide(job: Job, children: Observation, context: ReconcileContext) -> Decision:
    """Return the phase of the run and the next action; the first function that applies decides."""
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
    """Return whether the next decision may make a plan, which depends on the GPUs of the cluster."""
    # The pod is seen to end before its Job does.
    prepared = children.prepare is not None and not children.prepare.holds_resources
    training = any(child.role is Role.TRAIN for child in children.jobs)
    return bool(job.spec.resources.gpus_per_node) and prepared and not training


def is_terminal(status: QLoRAJobStatus) -> bool:
    """Return whether the run is over."""
    return status.phase in TERMINAL


def _late_publication(job: Job, children: Observation, number: int, context: ReconcileContext) -> Decision | None:
    """Succeed if an attempt that was given up has published after all."""
    for child in children.jobs:
        if child.role is Role.TRAIN and child.attempt < number:
            state = classify_child(job, child, context.now)
            if decision := decide_published(state, make_attempt(job, child.attempt), context.now):
                return decision
    return None


def _restart_preparation(status: QLoRAJobStatus, children: Observation, number: int) -> Decision | None:
    """Delete all Jobs after a lost attempt, or while prepare is being deleted, until they are gone.

    A training attempt no longer needs its prepare Job, so deleting that changes nothing.
    """
    prepare_deleted = children.prepare is not None and children.prepare.deleting and children.train(number) is None
    if not prepare_deleted and not any(_is_lost(child, status) for child in children.jobs if child.role is Role.TRAIN):
        return None
    message = (
        "Jobs were deleted, or lost without a termination message; preparation runs again and finds what was published"
    )
    return Decision(Phase.PREPARING, Reason.PREPARING, message, Action.DELETE_ALL_JOBS)


def _is_lost(train: ChildJob, status: QLoRAJobStatus) -> bool:
    reasons = {attempt.number: attempt.reason for attempt in status.attempts if attempt.reason}
    reason = reasons.get(train.attempt)
    return reason is Reason.POD_LOST or (train.deleting and reason is None)


def _follow_current_attempt(job: Job, children: Observation, number: int, context: ReconcileContext) -> Decision | None:
    """Follow the current attempt; it is lost if the status lists it and its Job does not exist."""
    if train := children.train(number):
        return follow_training(job, train, context)
    recorded = any(attempt.number == number for attempt in job.status.attempts)
    return decide_lost(make_attempt(job, number), context.now) if recorded else None


def _wait_for_earlier_attempts(
    status: QLoRAJobStatus, children: Observation, number: int, context: ReconcileContext
) -> Decision | None:
    """Wait until the pods of earlier attempts have ended and the back-off is over."""
    given_up = {attempt.number for attempt in status.attempts if attempt.reason in _ENDED_BY_OPERATOR}
    earlier = [child for child in children.jobs if child.role is Role.TRAIN and child.attempt < number]
    unfinished = [child for child in earlier if not child.finished]
    waiting = Decision(Phase.SCHEDULING, status.reason or Reason.SCHEDULING, status.message or "")
    if any(child.attempt in given_up and not child.deleting for child in unfinished):
        return replace(waiting, action=Action.DELETE_RUNNING_JOBS)
    if any(child.attempt not in given_up or is_busy(child, context.now) for child in unfinished):
        return replace(waiting, requeue_at=max(filter(None, map(deletion_deadline, unfinished)), default=None))
    retry_time = retry_at(budgeted_attempts(status))
    return replace(waiting, requeue_at=retry_time) if retry_time is not None and context.now < retry_time else None
