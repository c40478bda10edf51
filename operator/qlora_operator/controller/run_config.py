"""Keeps the configuration of an attempt current that its queue suspends and resumes: with what its next start needs."""

from dataclasses import replace
from datetime import datetime

from qlora_api.names import Phase
from qlora_api.v1alpha1 import Checkpoint, Progress
from qlora_operator.cluster.interface import AdmissionDeniedError, Cluster, NameConflictError
from qlora_operator.controller.children import with_denial
from qlora_operator.lifecycle import checkpoint_of_restart, reported_checkpoint, reported_manifests
from qlora_operator.lifecycle.gang import classify_child
from qlora_operator.lifecycle.volume_wait import next_volume_check, waits_for_volumes
from qlora_operator.models import AttemptInputs, ChildJob, Decision, Job, Observation, earliest
from qlora_operator.resources import Installation, Owner, build_resumption, build_run_config
from qlora_operator.status import derive_checkpoint


async def refresh_run_config(  # noqa: PLR0913, PLR0917 (as apply_decision)
    decision: Decision,
    job: Job,
    children: Observation,
    cluster: Cluster,
    installation: Installation,
    report: Progress | None,
    now: datetime,
) -> Decision:
    """Give the newest checkpoint to the next start of an attempt that its queue may suspend and resume.

    The trainer resumes from no other one, and deletes older ones. So each new checkpoint is passed on while the attempt
    trains: once it is suspended, the operator may be away. A ConfigMap that somebody deleted before the attempt started
    is created anew: without it the pods would hold their GPUs, and not start.
    """
    train = children.train(decision.attempt.number) if decision.attempt else None
    newest = derive_checkpoint(job.status, decision, report)
    if check_at := next_volume_check(train, now):
        decision = replace(decision, requeue_at=earliest(now, decision.requeue_at, check_at))
    starts = waits_for_volumes(train, now)
    if train is None or not (starts or _may_be_outdated(decision, job, train, newest)):
        return decision
    existing = await cluster.read_config_map(job.ref, train.name)
    known = {"checkpoint": newest, "last_report": report or job.status.last_report}
    checkpoint = checkpoint_of_restart(job.status.model_copy(update=known), train.suspended_at)
    try:
        if existing is None:
            if decision.attempt and decision.attempt.started_at is None:
                checkpoint = reported_checkpoint(job.status, train.attempt)
            await _create_anew(job, children, train, checkpoint, cluster, installation)
        elif not starts:
            published = reported_manifests(job.spec, job.status, train.attempt + 1)
            if patch := build_resumption(existing, Owner(job.ref, job.uid), checkpoint, published):
                await cluster.patch(patch)
    except (AdmissionDeniedError, NameConflictError) as error:
        return with_denial(decision, f"the attempt would not resume from its newest checkpoint: {error}")
    return decision


def _may_be_outdated(decision: Decision, job: Job, train: ChildJob, newest: Checkpoint | None) -> bool:
    """Return whether the ConfigMap is to be read: the Job has just been admitted, may be soon, or may be suspended."""
    if train.finished or train.deleting:
        return False
    if decision.phase is Phase.QUEUED:
        return decision.attempt is not None and bool(decision.attempt.container_seconds)
    return job.status.phase is Phase.QUEUED or bool(train.queue and newest != job.status.checkpoint)


async def _create_anew(  # noqa: PLR0913, PLR0917 (what a ConfigMap is built from)
    job: Job,
    children: Observation,
    train: ChildJob,
    checkpoint: Checkpoint | None,
    cluster: Cluster,
    installation: Installation,
) -> None:
    """Create the ConfigMap as for a new attempt; without the preparation, which has what is in it, there is none."""
    prepare, plan = children.prepare, job.status.plan
    message = classify_child(job, prepare, train.created_at).termination_message if prepare else None
    if message is None or message.prepared is None or plan is None:
        return
    published = reported_manifests(job.spec, job.status, train.attempt)
    run = AttemptInputs(train.attempt, plan, message.prepared, checkpoint=checkpoint, published=published)
    config = build_run_config(Owner(job.ref, job.uid), job.spec, run, installation.with_image_of(plan))
    await cluster.ensure(config)
