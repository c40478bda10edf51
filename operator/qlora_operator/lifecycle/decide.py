"""Decides the next phase and action, from the spec, the last status and the children.

Facts are written to the status before anything relies on them, so a crash between any two writes loses nothing: a
training Job is created only when model, output and plan are in the status, a prepare Job only when its number is. When
a Job's termination message is lost, one write records the loss and the number of the next prepare Job. So the prepare
Job of the recorded number is newer than the loss, without comparing the clocks of two machines, and nothing waits for
the deletion of an older one. The new prepare finds the manifest if the result was published.
"""

from dataclasses import replace
from typing import Final

from qlora_api.names import TERMINAL, Phase, Role
from qlora_api.reasons import Reason
from qlora_api.v1alpha1 import QLoRAJobStatus
from qlora_operator.lifecycle.context import ReconcileContext
from qlora_operator.lifecycle.gang import classify_child, deletion_deadline, is_busy
from qlora_operator.lifecycle.prepare_phase import follow_preparation
from qlora_operator.lifecycle.prepare_retries import current_preparation, next_preparation
from qlora_operator.lifecycle.retry_policy import retry_at
from qlora_operator.lifecycle.suspend import suspend
from qlora_operator.lifecycle.train_phase import (
    decide_lost,
    decide_published,
    follow_training,
    make_attempt,
    observed_attempt,
)
from qlora_operator.models import Action, Decision, Job, Observation
from qlora_planner.validation import Violation, check

_ENDED_BY_OPERATOR: Final = frozenset(
    {Reason.HEARTBEAT_LOST, Reason.NODE_LOST, Reason.POD_LOST, Reason.SUSPENDED_BY_USER}
)
"""Reasons with which the operator, not Kubernetes, ended an attempt; its pods may still run."""
_DELETED: Final = "the training Job is being deleted; then preparation runs again and finds what was published"


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


def _follow_current_attempt(job: Job, children: Observation, number: int, context: ReconcileContext) -> Decision | None:
    """Follow the current attempt; it is lost if its Job was deleted, and prepare runs again.

    A Job whose deletion cannot finish, because its node is dead, is not waited for.
    """
    train = children.train(number)
    if train is None:
        recorded = any(attempt.number == number for attempt in job.status.attempts)
        decision = decide_lost(make_attempt(job, number), context.now) if recorded else None
    elif not train.deleting:
        decision = follow_training(job, train, context)
    elif is_busy(train, context.now):
        return Decision(Phase.PREPARING, Reason.PREPARING, _DELETED, requeue_at=deletion_deadline(train))
    else:
        decision = decide_lost(observed_attempt(job, train), context.now)
    if decision is None or decision.phase is not Phase.PREPARING:
        return decision
    return replace(decision, preparation=next_preparation(current_preparation(job.status, children)))


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
    retry_time = retry_at(status.attempts)
    return replace(waiting, requeue_at=retry_time) if retry_time is not None and context.now < retry_time else None
