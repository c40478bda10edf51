"""Decides the next phase and action, from the spec, the last status and the children.

Facts are written to the status before anything relies on them, so a crash between any two writes loses nothing: a
training Job is created only when model, output and plan are in the status, a prepare Job only when its number is. When
a Job's termination message is lost, one write records the loss and the number of the next prepare Job. So the prepare
Job of the recorded number is newer than the loss, without comparing the clocks of two machines, and nothing waits for
the deletion of an older one. The new prepare finds the manifest if the result was published.
"""

from collections.abc import Collection
from dataclasses import replace
from datetime import datetime
from typing import Final

from qlora_api import __version__
from qlora_api.names import TERMINAL, Phase, Role
from qlora_api.reasons import Reason
from qlora_api.v1alpha1 import QLoRAJobSpec, QLoRAJobStatus
from qlora_api.v1alpha1.status import MAX_PLAN_REASON, MAX_PLAN_REASONS, MAX_PULL_SECRETS
from qlora_operator.lifecycle.budgets import retry_at
from qlora_operator.lifecycle.context import ReconcileContext
from qlora_operator.lifecycle.exit_reasons import POD_CREATION_TIME, failed_in_part, waits_long_for_pod
from qlora_operator.lifecycle.gang import classify_child, deletion_deadline, is_busy
from qlora_operator.lifecycle.node_health import avoided_nodes
from qlora_operator.lifecycle.prepare_phase import follow_preparation
from qlora_operator.lifecycle.prepare_retries import current_preparation, next_preparation
from qlora_operator.lifecycle.retry_policy import AT_ONCE
from qlora_operator.lifecycle.suspend import suspend
from qlora_operator.lifecycle.train_phase import (
    decide_deleted,
    decide_published,
    decide_vanished,
    follow_training,
    preempted,
    recorded_attempt,
)
from qlora_operator.models import Action, ChildJob, Decision, Job, Manifest, Observation, Skew, earliest
from qlora_planner.validation import Violation, check

_DELETED: Final = "the training Job is being deleted; then preparation runs again and finds what was published"


def rejected(violations: tuple[Violation, ...]) -> Decision:
    """Fail with the violations of a spec, which only the user can correct."""
    return Decision(Phase.FAILED, violations[0].reason, "; ".join(violation.message for violation in violations))


def decide(job: Job, children: Observation, context: ReconcileContext) -> Decision:
    """Return the phase of the run and the next action; a spec is judged once, before the first training Job exists."""
    if not is_under_way(job.status, job.skew, children) and (verdict := judge(job)):
        return verdict
    decision = _complete_plan(_decide(job, children, context), job, children)
    decision = _take_checkpoint(decision, job, children, context)
    return keep_as_it_is(job.status, job.skew) if job.skew.unreadable and not _is_harmless(decision) else decision


def is_under_way(status: QLoRAJobStatus, skew: Skew, children: Observation) -> bool:
    """Return whether a run has a plan, an attempt or a training Job, so that its spec is judged no more."""
    recorded = status.plan is not None or bool(status.attempts) or skew.recorded
    return recorded or any(child.role is Role.TRAIN for child in children.jobs)


def judge(job: Job) -> Decision | None:
    """Refuse the spec of a run that is not under way; one with words of a newer CRD waits for the newer operator."""
    if job.skew.unknown_words:
        return keep_as_it_is(job.status, job.skew)
    if job.skew.invalid:
        return rejected((Violation(Reason.INVALID_SPEC, job.skew.invalid),))
    violations = check(job.spec)
    return rejected(violations) if violations else None


def keep_as_it_is(status: QLoRAJobStatus, skew: Skew) -> Decision:
    """Change nothing but the message, for a run that depends on something that this version cannot read."""
    return Decision(status.phase or Phase.PENDING, status.reason or Reason.ACCEPTED, skew.unreadable)


def _is_harmless(decision: Decision) -> bool:
    """Return whether a decision follows, suspends or succeeds the run; it neither plans, starts nor fails anything."""
    attempt = decision.attempt
    follows = decision.action is Action.NONE and decision.plan is None and decision.phase is not Phase.FAILED
    return decision.reason is Reason.SUSPENDED_BY_USER or (
        follows and (attempt is None or attempt.reason in {None, Reason.PUBLISHED})
    )


def _complete_plan(decision: Decision, job: Job, children: Observation) -> Decision:
    """Add to a new plan the image that prepared the run, and what of the spec is ignored.

    Another image may name the result by another digest, so that what was trained would not be found.
    """
    plan, image = decision.plan, children.prepare.image if children.prepare else None
    if plan is None or plan.image is not None or image is None:
        return decision
    if decision.action is Action.TRAIN and job.status.retry is not None:
        # A retry was prepared with the image of the installation. That is recorded before anything trains with it.
        plan = plan.model_copy(update=_image_of(children.prepare))
        return replace(
            decision, action=Action.NONE, reason=Reason.PREPARED, plan=plan, attempt=None, requeue_after=AT_ONCE
        )
    if decision.reason is not Reason.PREPARED:
        return decision
    reasons = plan.reasons
    if job.skew.ignored:
        sentence = f"ignored, because operator {__version__} does not know it: spec fields {job.skew.ignored}"
        reasons = (*reasons, sentence[:MAX_PLAN_REASON])[-MAX_PLAN_REASONS:]
    return replace(decision, plan=plan.model_copy(update={**_image_of(children.prepare), "reasons": reasons}))


def _image_of(prepare: ChildJob | None) -> dict[str, object]:
    """Return the image of a prepare Job as a plan records it; a registry of its own needs its own Secrets."""
    secrets = prepare.pull_secrets[:MAX_PULL_SECRETS] if prepare else ()
    return {"image": prepare.image if prepare else None, "image_pull_secrets": secrets or None}


def _take_checkpoint(decision: Decision, job: Job, children: Observation, context: ReconcileContext) -> Decision:
    """Add the newest checkpoint that an attempt wrote as it was stopped, after its end was recorded."""
    found = [decision.checkpoint] if decision.checkpoint else []
    for child in children.jobs:
        message = classify_child(job, child, context.now).termination_message if child.role is Role.TRAIN else None
        found += [message.checkpoint] if message and message.checkpoint else []
    newest, known = max(found, key=lambda checkpoint: checkpoint.time, default=None), job.status.checkpoint
    if newest is None or decision.phase is Phase.SUCCEEDED or (known is not None and newest.time <= known.time):
        return decision
    return replace(decision, checkpoint=newest)


def current_attempt(status: QLoRAJobStatus) -> int:
    """Return the number of the attempt that runs, or that would be the next one."""
    return 1 + max((attempt.number for attempt in status.attempts if attempt.reason), default=0)


def vanished_attempt(status: QLoRAJobStatus, children: Observation) -> int | None:
    """Return the number of an attempt under way whose Job is not among the children; None if there is no such one."""
    number = current_attempt(status)
    recorded = any(attempt.number == number for attempt in status.attempts)
    return number if recorded and children.train(number) is None else None


def _decide(job: Job, children: Observation, context: ReconcileContext) -> Decision:
    """Return what follows from the children; the first function that applies decides."""
    number = current_attempt(job.status)
    return (
        _late_publication(job, children, number, context)
        or suspend(job, children, number, context)
        or _follow_current_attempt(job, children, number, context)
        or _wait_for_earlier_attempts(job.status, children, number, context)
        or _avoid_nodes(_prepare(job, children, number, context), job, context)
    )


def _prepare(job: Job, children: Observation, number: int, context: ReconcileContext) -> Decision:
    """Follow the preparation; a plan counts a node that no run uses for now like one that is cordoned."""
    gpu_nodes = children.gpu_nodes
    if gpu_nodes is not None:
        gpu_nodes = tuple(_cordon(node, context.quarantined_nodes) for node in gpu_nodes)
    placed = replace(job, spec=_add_placement(job.spec, context))
    return follow_preparation(placed, replace(children, gpu_nodes=gpu_nodes), number, context.now)


def _add_placement(spec: QLoRAJobSpec, context: ReconcileContext) -> QLoRAJobSpec:
    """Return the spec with the installation's node labels and tolerations, so that it is planned for the same nodes."""
    resources = spec.resources
    placement = {
        "node_selector": {**context.node_selector, **resources.node_selector},
        "tolerations": (*resources.tolerations, *context.tolerations),
    }
    return spec.model_copy(update={"resources": resources.model_copy(update=placement)})


def _cordon(node: Manifest, quarantined: Collection[str]) -> Manifest:
    if node.get("metadata", {}).get("name") not in quarantined:
        return node
    return {**node, "spec": {**node.get("spec", {}), "unschedulable": True}}


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
        if not child.deleting
        if waits_long_for_pod(child, now) or _just_failed_in_part(job, child) or _just_preempted(job, child, now)
    )


def _just_failed_in_part(job: Job, child: ChildJob) -> bool:
    current = child.role is Role.TRAIN and child.attempt == current_attempt(job.status)
    return current and failed_in_part(child)


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


def _follow_current_attempt(job: Job, children: Observation, number: int, context: ReconcileContext) -> Decision | None:
    """Follow the current attempt; it is lost if its Job was deleted, and prepare runs again.

    A Job whose deletion cannot finish, because its node is dead, is not waited for.
    """
    train = children.train(number)
    if train is None:
        decision = _lose_vanished_attempt(job, children, context)
    elif not train.deleting:
        decision = follow_training(job, train, context)
    elif is_busy(train, context.now):
        deadline = deletion_deadline(train, context.now)
        return Decision(Phase.PREPARING, Reason.PREPARING, _DELETED, requeue_at=deadline)
    else:
        decision = decide_deleted(job, train, context)
    if decision is None or decision.phase is not Phase.PREPARING:
        return decision
    return replace(decision, preparation=next_preparation(current_preparation(job.status, children)))


def _lose_vanished_attempt(job: Job, children: Observation, context: ReconcileContext) -> Decision | None:
    """Record the loss of an attempt that the status lists and whose Job does not exist."""
    number = vanished_attempt(job.status, children)
    return decide_vanished(job, number, context) if number is not None else None


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
