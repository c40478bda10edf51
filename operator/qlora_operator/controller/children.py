"""Applies a decision to the Jobs, ConfigMaps and Services of a run."""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Final

from qlora_api.job_ref import JobRef
from qlora_api.names import CLASS_KIND, Phase, Role
from qlora_api.pod_profile import DEFAULT_PROFILE
from qlora_api.reasons import Reason
from qlora_operator.cluster.interface import AdmissionDeniedError, Cluster, NameConflictError
from qlora_operator.lifecycle import (
    disliked_nodes,
    job_deadline,
    leftover_jobs,
    next_leftover,
    reported_checkpoint,
    reported_manifests,
    vanished_attempt,
)
from qlora_operator.lifecycle.prepare_retries import next_preparation
from qlora_operator.lifecycle.queue import queued_jobs
from qlora_operator.models import Action, AttemptInputs, ChildJob, Decision, Job, Manifest, Observation, earliest
from qlora_operator.resources import (
    Installation,
    Owner,
    build_deadline,
    build_job_identity,
    build_prepare_config,
    build_prepare_job,
    build_queue_labels,
    build_run_config,
    build_service,
    build_train_job,
)
from qlora_operator.status import merge_attempt

ADMISSION_DENIED_RETRY: Final = timedelta(minutes=1)
"""People have to change quotas and policies, so retrying sooner gains nothing."""
NAME_CONFLICT_RETRY: Final = timedelta(seconds=5)
"""The garbage collector needs a few seconds to delete the children of a deleted QLoRAJob."""
NAME_CONFLICT_PATIENCE: Final = timedelta(minutes=5)
"""A prepare Job of a deleted QLoRAJob that still exists then is on a node that does not respond."""

SHORTEST_DEADLINE: Final = 1
"""Seconds; the least that activeDeadlineSeconds may be."""


async def apply_decision(  # noqa: PLR0913, PLR0917 (everything that a decision is applied to)
    decision: Decision, job: Job, children: Observation, cluster: Cluster, installation: Installation, now: datetime
) -> tuple[Decision, bool]:
    """Apply a decision to the children; return it, or its replacement if a child is refused, and if any was created."""
    created = False
    try:
        for child in build_children(decision, job, installation):
            created |= await ensure_child(child, job, cluster)
    except NameConflictError as error:
        return on_name_conflict(error, decision, job, now), created
    except AdmissionDeniedError as error:
        return on_admission_denied(error, job, installation), created
    running = running_jobs(children) if decision.action is Action.DELETE_RUNNING_JOBS else []
    denial = await delete_jobs([*running, *outdated_prepare_jobs(job, children)], job.ref, cluster)
    return with_denial(decision, denial) if denial else decision, created


async def ensure_child(child: Manifest, job: Job, cluster: Cluster) -> bool:
    """Create a child, and return whether it was; a Job that exists gets back the labels and owner that it lost."""
    try:
        created = await cluster.ensure(child)
    except NameConflictError:
        if child["kind"] == "Job" and await cluster.restore_job(child, job.created_at):
            return False
        raise
    if not created and child["kind"] == "Job":
        await cluster.restore_job(child, job.created_at)
    return created


async def restore_jobs(job: Job, children: Observation, cluster: Cluster) -> bool:
    """Restore the labels and owners of Jobs that are not watched, or not found; return whether any was restored.

    An attempt whose Job is not found counts as lost, and the next one would train beside it.
    """
    owner, vanished = Owner(job.ref, job.uid), vanished_attempt(job.status, children)
    unwatched = [child for child in children.jobs if not (child.watched or child.finished or child.deleting)]
    identities = [(child.role, child.attempt) for child in unwatched]
    identities += [(Role.TRAIN, vanished)] if vanished is not None else []
    jobs = [build_job_identity(owner, role, number) for role, number in identities]
    return any([await cluster.restore_job(child, job.created_at) for child in jobs])


async def limit_jobs(decision: Decision, job: Job, children: Observation, cluster: Cluster, now: datetime) -> Decision:
    """Adjust the deadlines of the Jobs, delete those that outlive what they were for, and return when the next will."""
    if decision.action is Action.NONE:
        decision = await set_deadlines(decision, job, children, cluster, now)
        decision = await queue_jobs(decision, job, children, cluster)
        denial = await delete_jobs(leftover_jobs(job.status, children, now), job.ref, cluster)
        decision = with_denial(decision, denial) if denial else decision
    requeue_at = earliest(now, decision.requeue_at, next_leftover(job.status, children, now))
    return replace(decision, requeue_at=requeue_at or decision.requeue_at)


async def set_deadlines(
    decision: Decision, job: Job, children: Observation, cluster: Cluster, now: datetime
) -> Decision:
    """Set the deadlines of the Jobs; where a policy or a webhook refuses that, follow the run all the same."""
    try:
        for patch in outdated_deadlines(decision, job, children, now):
            await cluster.patch(patch)
    except AdmissionDeniedError as error:
        return with_denial(decision, f"its deadline is not set: {error}")
    return decision


async def queue_jobs(decision: Decision, job: Job, children: Observation, cluster: Cluster) -> Decision:
    """Put suspended Jobs into the queue of their run; a queue that admits one meanwhile refuses the change."""
    try:
        for patch in missing_queue_labels(job, children):
            await cluster.patch(patch)
    except AdmissionDeniedError as error:
        return replace(decision, message=f"spec.queue: {error}", requeue_after=ADMISSION_DENIED_RETRY)
    return decision


def with_denial(decision: Decision, denial: str) -> Decision:
    """Return a decision that says what was denied, and is made again soon."""
    message = f"{decision.message}; {denial}" if decision.message else denial
    return replace(decision, message=message, requeue_after=ADMISSION_DENIED_RETRY)


def build_children(decision: Decision, job: Job, installation: Installation) -> tuple[Manifest, ...]:
    """Return the children to create, the ConfigMap first, because the pod mounts it."""
    owner = Owner(job.ref, job.uid)
    installation = installation.with_image_of(job.status.plan)
    if decision.action is Action.PREPARE and decision.preparation:
        return (
            build_prepare_config(owner, job.spec, installation, reported_manifests(job.spec, job.status)),
            build_prepare_job(owner, job.spec, installation, decision.preparation),
        )
    if decision.action is Action.TRAIN and decision.plan and decision.prepared and decision.attempt:
        run = AttemptInputs(
            decision.attempt.number,
            decision.plan,
            decision.prepared,
            avoided_nodes=decision.attempt.avoided_nodes or (),
            disliked_nodes=disliked_nodes(job.status.attempts),
            checkpoint=reported_checkpoint(job.status, decision.attempt.number),
            published=reported_manifests(job.spec, job.status, decision.attempt.number),
        )
        return (
            build_run_config(owner, job.spec, run, installation),
            *([build_service(owner, run.attempt)] if run.plan.nodes > 1 else []),
            build_train_job(owner, job.spec, run, installation),
        )
    return ()


def on_name_conflict(error: NameConflictError, decision: Decision, job: Job, now: datetime) -> Decision:
    """Wait for the child of an earlier QLoRAJob to be deleted; fail a new run if the name is of something else.

    A prepare Job is not waited for without end: the next one has another name.
    """
    if not error.being_deleted and job.status.attempts:
        return Decision(Phase.SCHEDULING, Reason.POD_REJECTED, str(error), requeue_after=ADMISSION_DENIED_RETRY)
    if not error.being_deleted:
        return Decision(Phase.FAILED, Reason.INVALID_SPEC, str(error))
    waiting = Decision(Phase.PENDING, Reason.ACCEPTED, str(error), requeue_after=NAME_CONFLICT_RETRY)
    waited = job.status.started_at is not None and now >= job.status.started_at + NAME_CONFLICT_PATIENCE
    if decision.action is Action.PREPARE and decision.preparation is not None and waited:
        return replace(waiting, preparation=next_preparation(decision.preparation))
    return replace(waiting, preparation=decision.preparation)


def on_admission_denied(error: AdmissionDeniedError, job: Job, installation: Installation) -> Decision:
    """Fail if the child can never be created; wait if a policy may change, or if one like it was valid before.

    What the installation sets in pods may be what is invalid, and somebody may correct it.
    """
    message = str(error)
    if error.permanent and not job.status.attempts:
        if installation.pods == DEFAULT_PROFILE:
            return Decision(Phase.FAILED, Reason.INVALID_SPEC, message)
        settings = f" and {CLASS_KIND} {installation.used_class}" if installation.used_class else ""
        message = f"{message}; correct the spec, or what the chart's values{settings} set under pods"
    return Decision(Phase.PENDING, Reason.POD_REJECTED, message, requeue_after=ADMISSION_DENIED_RETRY)


def running_jobs(children: Observation) -> list[ChildJob]:
    """Return the Jobs that still run; their pods get the grace period to write a checkpoint.

    A Job whose pods have ended is kept, even if it is not marked as finished yet: it may hold the result of prepare.
    """
    return [child for child in children.jobs if child.holds_resources and not child.deleting]


async def delete_jobs(jobs: Iterable[ChildJob], ref: JobRef, cluster: Cluster) -> str:
    """Delete Jobs; return what was denied, or nothing. The pods of one that may not be deleted are ended all the same.

    Kubernetes ends them when the deadline of the Job has passed.
    """
    denials: list[str] = []
    for child in jobs:
        try:
            await cluster.delete_job(ref, child)
        except AdmissionDeniedError as error:
            denials.append(str(error))
            if child.holds_resources and not child.suspended:
                with suppress(AdmissionDeniedError):
                    await cluster.patch(build_deadline(ref, child, SHORTEST_DEADLINE))
    return "; ".join(denials)


def outdated_prepare_jobs(job: Job, children: Observation) -> list[ChildJob]:
    """Return the prepare Jobs before the recorded one; nothing waits for their deletion."""
    current = job.status.preparation.number if job.status.preparation else 1
    return [
        child
        for child in children.jobs
        if child.role is Role.PREPARE and child.attempt < current and not child.deleting
    ]


def missing_queue_labels(job: Job, children: Observation) -> list[Manifest]:
    """Return the patches that put suspended Jobs into the queue of their run: prepare Jobs, and after it changed."""
    queue, queued = job.spec.queue, queued_jobs(children)
    if queue is None:
        return []
    return [
        build_queue_labels(job.ref, child, queue)
        for child in children.jobs
        if child.name in queued
        and (child.queue, child.priority_class) != (queue.name, queue.priority_class or child.priority_class)
    ]


def outdated_deadlines(decision: Decision, job: Job, children: Observation, now: datetime) -> list[Manifest]:
    """Return the patches that Jobs need when a container starts, is suspended, or spec.deadlines.total changes."""
    if job.skew.unreadable:
        return []
    attempts = merge_attempt(job.status.attempts, decision.attempt)
    return [
        build_deadline(job.ref, child, seconds)
        for child in children.jobs
        if not (child.finished or child.failing or child.deleting or not child.holds_resources)
        and (seconds := job_deadline(job, child, attempts, now)) != child.deadline_seconds
    ]
