"""Decides the next phase and action, from the spec, the last status and the children.

Facts are written to the status before anything relies on them, so a crash between any two writes loses nothing: a
training Job is created only when model, output and plan are in the status. When a Job's termination message is lost,
the prepare Job is deleted, then the loss is recorded, then the Job is deleted, then prepare runs again. This order
proves that a prepare Job that exists once the loss is recorded is newer than the loss, without comparing the clocks of
two machines. The new prepare finds the manifest if the result was published.
"""

from dataclasses import replace
from datetime import datetime

from qlora_api.names import TERMINAL, Phase, Role
from qlora_api.reasons import Reason
from qlora_api.v1alpha1 import QLoRAJobStatus
from qlora_operator.lifecycle.budgets import retry_at
from qlora_operator.lifecycle.container_time import stop_counting
from qlora_operator.lifecycle.context import ReconcileContext
from qlora_operator.lifecycle.exit_reasons import POD_CREATION_TIME, waits_long_for_pod
from qlora_operator.lifecycle.gang import classify_child, deletion_deadline, is_busy
from qlora_operator.lifecycle.node_health import avoided_nodes
from qlora_operator.lifecycle.prepare_phase import follow_preparation
from qlora_operator.lifecycle.suspend import suspend
from qlora_operator.lifecycle.train_phase import (
    decide_lost,
    decide_published,
    follow_training,
    preempted,
    recorded_attempt,
)
from qlora_operator.models import Action, ChildJob, Decision, Job, Observation, earliest
from qlora_planner.validation import Violation, check


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
        or _avoid_nodes(follow_preparation(job, children, number, context.now), job, context)
    )


def _avoid_nodes(decision: Decision, job: Job, context: ReconcileContext) -> Decision:
    """Return the decision with the nodes that a new attempt avoids, because attempts failed there."""
    avoided = avoided_nodes(job.status.attempts, context.quarantined_nodes, context.now)
    if decision.action is not Action.TRAIN or decision.attempt is None or not avoided:
        return decision
    nodes = ", ".join(f"{node} (until {until:%H:%M} UTC)" for node, until in avoided.items())
    attempt = decision.attempt.model_copy(update={"avoided_nodes": tuple(avoided)})
    message = f"{decision.message}; it avoids nodes on which attempts failed: {nodes}"
    return replace(decision, attempt=attempt, message=message)


def needs_gpu_nodes(job: Job, children: Observation) -> bool:
    """Return whether the next decision may make a plan, which depends on the GPUs of the cluster."""
    # The pod is seen to end before its Job does.
    prepared = children.prepare is not None and not children.prepare.holds_resources
    training = any(child.role is Role.TRAIN for child in children.jobs)
    return bool(job.spec.resources.gpus_per_node) and prepared and not training


def unexplained_jobs(job: Job, children: Observation, now: datetime) -> tuple[str, ...]:
    """Return the Jobs whose Events say why they have no pod, or why a queue has suspended them."""
    return tuple(
        child.name
        for child in children.jobs
        if not child.deleting and (waits_long_for_pod(child, now) or _just_preempted(job, child, now))
    )


def _just_preempted(job: Job, child: ChildJob, now: datetime) -> bool:
    return preempted(job, child) and now < (child.suspended_at or now) + 2 * POD_CREATION_TIME


def is_terminal(status: QLoRAJobStatus) -> bool:
    """Return whether the run is over."""
    return status.phase in TERMINAL


def _late_publication(job: Job, children: Observation, number: int, context: ReconcileContext) -> Decision | None:
    """Succeed if an attempt that was given up has published after all."""
    for child in children.jobs:
        if child.role is Role.TRAIN and child.attempt < number:
            state = classify_child(job, child, context.now)
            if decision := decide_published(state, recorded_attempt(job, child.attempt), context.now):
                return decision
    return None


def _restart_preparation(status: QLoRAJobStatus, children: Observation, number: int) -> Decision | None:
    """Delete all Jobs after a lost attempt, or while prepare is being deleted, until they are gone.

    A training attempt no longer needs its prepare Job, so deleting that changes nothing.
    """
    prepare_deleted = children.prepare is not None and children.prepare.deleting and children.train(number) is None
    if not prepare_deleted and not any(
        _is_lost(child, status, number) for child in children.jobs if child.role is Role.TRAIN
    ):
        return None
    message = (
        "Jobs were deleted, or lost without a termination message; preparation runs again and finds what was published"
    )
    return Decision(Phase.PREPARING, Reason.PREPARING, message, Action.DELETE_ALL_JOBS)


def _is_lost(train: ChildJob, status: QLoRAJobStatus, number: int) -> bool:
    """Return whether a Job was lost; one of an earlier attempt that is no longer listed was not."""
    lost = any(attempt.number == train.attempt and attempt.reason is Reason.POD_LOST for attempt in status.attempts)
    return lost or (train.deleting and train.attempt >= number)


def _follow_current_attempt(job: Job, children: Observation, number: int, context: ReconcileContext) -> Decision | None:
    """Follow the current attempt; it is lost if the status lists it and its Job does not exist."""
    if train := children.train(number):
        return follow_training(job, train, context)
    if not any(attempt.number == number for attempt in job.status.attempts):
        return None
    report = context.last_report or job.status.last_report
    lost = stop_counting(recorded_attempt(job, number), report.updated_at if report else None, context.now)
    return decide_lost(job, lost, context.now)


def _wait_for_earlier_attempts(
    status: QLoRAJobStatus, children: Observation, number: int, context: ReconcileContext
) -> Decision | None:
    """Wait until the trainers of earlier attempts have ended or are given up, and the back-off is over.

    A Job that does not finish by itself is deleted (`leftovers`); what else runs in its pods is not waited for.
    """
    earlier = [child for child in children.jobs if child.role is Role.TRAIN and child.attempt < number]
    unfinished = [child for child in earlier if not child.finished]
    waiting = Decision(Phase.SCHEDULING, status.reason or Reason.SCHEDULING, status.message or "")
    if any(not child.deleting or is_busy(child, context.now) for child in unfinished):
        ends = (deletion_deadline(child, context.now) for child in unfinished)
        return replace(waiting, requeue_at=earliest(context.now, *ends))
    retry_time = retry_at(status.attempts, status.forgiven_attempts)
    return replace(waiting, requeue_at=retry_time) if retry_time is not None and context.now < retry_time else None
