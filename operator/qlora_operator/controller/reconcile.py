"""Reconciles one QLoRAJob: read it, list its children, decide, apply the decision, write the status once."""

import logging
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Final

from qlora_api.job_ref import JobRef
from qlora_api.names import Phase, Role
from qlora_api.reasons import Reason
from qlora_api.v1alpha1 import Progress, QLoRAJobStatus
from qlora_operator.cluster.interface import AdmissionDeniedError, Cluster, InvalidStatusError, NameConflictError
from qlora_operator.controller.finished import reconcile_finished
from qlora_operator.controller.requeue import requeue_delay
from qlora_operator.controller.result import ReconcileRequest, ReconcileResult, account_gpu_time, write_if_changed
from qlora_operator.lifecycle import (
    ReconcileContext,
    checkpoint_of_restart,
    decide,
    disliked_nodes,
    is_terminal,
    is_uncertain,
    is_under_way,
    job_deadline,
    keep_as_it_is,
    leftover_jobs,
    needs_gpu_nodes,
    next_leftover,
    rejected,
    reported_checkpoint,
    reported_manifests,
    retry_limits,
    revive,
    unexplained_jobs,
)
from qlora_operator.lifecycle.gang import classify_child
from qlora_operator.lifecycle.leftovers import END_GRACE
from qlora_operator.lifecycle.prepare_retries import next_preparation
from qlora_operator.lifecycle.queue import queued_jobs
from qlora_operator.lifecycle.retry_policy import AT_ONCE
from qlora_operator.lifecycle.retry_request import (
    begin_retry,
    describe_no_effect,
    is_pending,
    is_recorded,
    is_settled,
    note_request,
    record_request,
)
from qlora_operator.models import (
    Action,
    AttemptInputs,
    ChildJob,
    Decision,
    Job,
    Manifest,
    Observation,
    RawJob,
    earliest,
)
from qlora_operator.resources import (
    Installation,
    Owner,
    build_deadline,
    build_event,
    build_prepare_config,
    build_prepare_job,
    build_queue_labels,
    build_run_config,
    build_service,
    build_train_job,
)
from qlora_operator.status import (
    derive_alternatives,
    derive_checkpoint,
    merge_attempt,
    without_refused_reasons,
)
from qlora_operator.stored_job import ReadJob, read_job
from qlora_planner.validation import Violation

_log = logging.getLogger(__name__)

ADMISSION_DENIED_RETRY: Final = timedelta(minutes=1)
"""People have to change quotas and policies, so retrying sooner gains nothing."""
CLEAN_UP_AFTER: Final = {Phase.FAILED: AT_ONCE, Phase.SUCCEEDED: END_GRACE}
"""When a run that is over is reconciled again, to release what it holds."""
NO_POD_EVENT: Final = "FailedCreate"
"""Reason of the Event of the Job controller for a pod that the API server refused."""
SUSPENDED_EVENT: Final = "Stopped"
"""Reason of the Event of Kueue for a Job that it has suspended."""
EVENT_LEAD: Final = timedelta(seconds=15)
"""By how much an Event may be earlier than the Job controller's note in the Job of what it is about."""
NAME_CONFLICT_RETRY: Final = timedelta(seconds=5)
"""The garbage collector needs a few seconds to delete the children of a deleted QLoRAJob."""
NAME_CONFLICT_PATIENCE: Final = timedelta(minutes=5)
"""A prepare Job of a deleted QLoRAJob that still exists then is on a node that does not respond."""


async def reconcile(
    ref: JobRef, cluster: Cluster, installation: Installation, context: ReconcileContext, cached: RawJob | None = None
) -> ReconcileResult:
    """Bring the cluster to the spec, and write the status.

    The cached copy of the QLoRAJob may be stale. It is enough for the first step, which is idempotent, and to see that
    there is nothing to do; for anything else the QLoRAJob is read live (docs/decisions/0010-late-views.md).
    """
    if cached is not None:
        result = await reconcile_once(cached, cluster, installation, context, from_cache=True)
        if result is not None:
            return result
    raw = await cluster.read_job(ref)
    if raw is None:
        return ReconcileResult(gone=True)
    return await reconcile_once(raw, cluster, installation, context, from_cache=False) or ReconcileResult()


async def reconcile_once(
    raw: RawJob, cluster: Cluster, installation: Installation, context: ReconcileContext, *, from_cache: bool
) -> ReconcileResult | None:
    """Reconcile a QLoRAJob once, unless it belongs to another installation; None: read it live first."""
    if raw.deleting:
        return ReconcileResult()
    claimant, claimed_by = context.claimant, raw.status.get("operator")
    if other := claimant.find_other(claimed_by):
        return ReconcileResult(belongs_to=other)
    read = read_job(raw)
    stored = read.status
    if claimed_by is not None and claimed_by != claimant.installation:
        read = read._replace(status=without_reports(stored))
    request = ReconcileRequest(raw, read.status, without_stale_report(context, raw), stored)
    if is_terminal(read.status):
        return await reconcile_ended(request, read, cluster, installation, from_cache=from_cache)
    if claimant.must_claim(claimed_by):
        return await claim(request, cluster)
    return await reconcile_unfinished(request, read, cluster, installation, from_cache=from_cache)


async def reconcile_unfinished(
    request: ReconcileRequest, read: ReadJob, cluster: Cluster, installation: Installation, *, from_cache: bool
) -> ReconcileResult | None:
    """Reconcile a run that has not ended; None: the cached copy is not enough to act on, read it live."""
    raw, spec = request.raw, read.spec
    if spec is None:
        return None if from_cache else await reconcile_unreadable(request, read, cluster)
    job = Job(raw.ref, raw.uid, raw.generation, raw.created_at, spec, read.status, read.skew)
    children = cluster.children_from_cache(raw)
    now = request.context.now
    decision = decide(job, children, request.context)
    # A queue is asked when its time has come, not after each event.
    asks_queue = not from_cache and bool(queued_jobs(children))
    cache_is_enough = (is_noop(decision, job, children, now) and not asks_queue) or (
        is_first_step(decision, job) and not (from_cache and children.jobs)
    )
    if from_cache and not cache_is_enough:
        return None
    if not cache_is_enough:
        children = await list_children_and_gpu_nodes(job, raw, cluster, now)
        decision = decide(job, children, request.context)
    decision, created = await apply_decision(decision, job, children, cluster, installation, now)
    if decision.phase is Phase.FAILED:
        decision = replace(decision, retry_limits=retry_limits(job))
    if created and is_first_step(decision, job):
        return ReconcileResult(AT_ONCE)  # status comes after the first steps of all queued QLoRAJobs
    decision = await limit_jobs(decision, job, children, cluster, now)
    await refresh_run_config(decision, job, children, cluster, installation, request.context.last_report)
    return await write_status(request, decision, children, cluster)


def without_reports(status: QLoRAJobStatus) -> QLoRAJobStatus:
    """Drop the last report, which another installation received: the pod reports to that one, and not to this."""
    return status.model_copy(update={"last_report": None})


async def claim(request: ReconcileRequest, cluster: Cluster) -> ReconcileResult:
    """Record which installation reconciles the run; of two that try, the API server refuses the second one."""
    previous = request.previous_status
    decision = Decision(
        previous.phase or Phase.PENDING,
        previous.reason or Reason.ACCEPTED,
        previous.message or "",
        requeue_after=AT_ONCE,
    )
    return await write_status(request, decision, None, cluster)


def is_first_step(decision: Decision, job: Job) -> bool:
    """Return whether a decision is the first step of a run; it is idempotent, since names of children are derived."""
    step = decision.action in {Action.PREPARE, Action.NONE} and decision.phase is Phase.PREPARING
    return step and job.status.phase is None


def is_noop(decision: Decision, job: Job, children: Observation, now: datetime) -> bool:
    """Return whether a decision changes and records nothing, so that a stale cache can do no harm."""
    ended = decision.attempt and decision.attempt.reason
    facts = (decision.plan, decision.prepared, decision.result, decision.checkpoint, ended)
    # The deadline of a preparation depends on its own pod only, and a newer view corrects it.
    training = replace(children, jobs=tuple(child for child in children.jobs if child.role is Role.TRAIN))
    to_do = (
        outdated_deadlines(decision, job, training, now),
        missing_queue_labels(job, children),
        outdated_prepare_jobs(job, children),
        leftover_jobs(job.status, children, now),
        unexplained_jobs(job, children, now),
        is_uncertain(job.status, children, now),
    )
    return (
        decision.action is Action.NONE
        and (decision.phase, decision.reason) == (job.status.phase, job.status.reason)
        and not any(facts)
        and decision.preparation in (None, job.status.preparation)
        and not any(to_do)
    )


async def list_children_and_gpu_nodes(job: Job, raw: RawJob, cluster: Cluster, now: datetime) -> Observation:
    """List the children live, the GPU nodes if a plan depends on them, and Events of a Job that has no pod."""
    children = await cluster.list_children(raw)
    if needs_gpu_nodes(job, children):
        children = replace(children, gpu_nodes=await cluster.find_gpu_nodes())
    unexplained = unexplained_jobs(job, children, now)
    queued = queued_jobs(children)
    jobs = [
        await with_event_message(child, raw.ref, cluster, looked_up=child.name in unexplained)
        for child in children.jobs
    ]
    jobs = [await with_workload(child, raw.ref, cluster) if child.name in queued else child for child in jobs]
    return replace(children, jobs=tuple(jobs))


async def with_workload(child: ChildJob, ref: JobRef, cluster: Cluster) -> ChildJob:
    """Return a Job with what its queue says."""
    return replace(child, workload=await cluster.find_workload(ref, child.uid))


async def with_event_message(child: ChildJob, ref: JobRef, cluster: Cluster, *, looked_up: bool) -> ChildJob:
    """Return a Job with the message of the Event that says why it has no pod, or why it was suspended."""
    if not looked_up:
        return child
    reasons = {SUSPENDED_EVENT} if child.suspended else {NO_POD_EVENT}
    since = (child.started_at or child.suspended_at or child.created_at) - EVENT_LEAD
    return replace(child, event_message=await cluster.find_event(ref, child.uid, reasons, since))


def without_stale_report(context: ReconcileContext, raw: RawJob) -> ReconcileContext:
    """Drop a report that belongs to a deleted QLoRAJob with the same name."""
    report = context.last_report
    stale = report and (report.updated_at < raw.created_at or context.report_job_uid not in {None, raw.uid})
    return replace(context, last_report=None) if stale else context


async def reconcile_unreadable(request: ReconcileRequest, read: ReadJob, cluster: Cluster) -> ReconcileResult:
    """Leave a run alone whose spec lacks a field that this version requires; refuse it if it is not under way."""
    keeps = read.skew.unknown_words or is_under_way(read.status, read.skew, await cluster.list_children(request.raw))
    violation = Violation(Reason.INVALID_SPEC, read.skew.invalid)
    decision = keep_as_it_is(read.status, read.skew) if keeps else rejected((violation,))
    return await write_status(request, decision, None, cluster)


async def reconcile_ended(
    request: ReconcileRequest, read: ReadJob, cluster: Cluster, installation: Installation, *, from_cache: bool
) -> ReconcileResult | None:
    """Reconcile a run that has ended, unless it is to continue; None: read the QLoRAJob live first.

    Somebody may ask for it, or have raised the limit that ended it.
    """
    raw, previous = request.raw, request.previous_status
    if not is_settled(previous, raw.retry_request):
        return None if from_cache else await answer_retry_request(request, cluster)
    if read.spec is not None and not read.skew.unreadable:
        job = Job(raw.ref, raw.uid, raw.generation, raw.created_at, read.spec, read.status, read.skew)
        if decision := revive(job, request.context.now):
            return None if from_cache else await revive_run(job, decision, request, cluster)
    return await reconcile_finished(request, cluster, installation.retention, from_cache=from_cache)


async def revive_run(job: Job, decision: Decision, request: ReconcileRequest, cluster: Cluster) -> ReconcileResult:
    """Delete the Jobs that a failed run left running, and let it continue."""
    children = await cluster.list_children(request.raw)
    await delete_running_jobs(job, children, cluster)
    return await write_status(request, decision, children, cluster)


async def answer_retry_request(request: ReconcileRequest, cluster: Cluster) -> ReconcileResult:
    """Record a request to retry a finished run; once it is recorded, start a failed run again.

    The Jobs are deleted before the status says so: after a crash in between, the rest of them is deleted.
    """
    raw, previous, now = request.raw, request.previous_status, request.context.now
    if not is_pending(previous, raw.retry_request):
        status = record_request(previous, raw.retry_request)
        await _warn_of_request_without_effect(request, cluster)
        written = await write_if_changed(request, status, cluster)
        # An older CRD stores nothing of it, and repeating the write at once would not change that.
        return ReconcileResult(None if written == raw.resource_version else AT_ONCE, written, status)
    children = await cluster.list_children(raw)
    for child in children.jobs:
        if not child.deleting:
            await cluster.delete_job(raw.ref, child)
    begun, decision = begin_retry(previous, now)
    begun_request = replace(request, previous_status=begun, read_status=previous)
    return await write_status(begun_request, decision, children, cluster)


async def _warn_of_request_without_effect(request: ReconcileRequest, cluster: Cluster) -> None:
    """Record an Event for a new request to retry a run that has not failed; a new run has none to refer to."""
    raw, status = request.raw, request.previous_status
    if is_recorded(status, raw.retry_request) or status.phase in {None, Phase.FAILED}:
        return
    told = status.model_copy(update={"message": describe_no_effect(status)})
    event = build_event(Owner(raw.ref, raw.uid), f"{raw.resource_version}/retry", told, request.context.now)
    await cluster.record_event(event)


async def apply_decision(  # noqa: PLR0913, PLR0917 (everything that a decision is applied to)
    decision: Decision, job: Job, children: Observation, cluster: Cluster, installation: Installation, now: datetime
) -> tuple[Decision, bool]:
    """Apply a decision to the children; return it, or its replacement if a child is refused, and if any was created."""
    created = False
    try:
        for child in build_children(decision, job, installation):
            created |= await cluster.ensure(child)
    except NameConflictError as error:
        return on_name_conflict(error, decision, job, now), created
    except AdmissionDeniedError as error:
        return on_admission_denied(error, job), created
    if decision.action is Action.DELETE_RUNNING_JOBS:
        await delete_running_jobs(job, children, cluster)
    for outdated in outdated_prepare_jobs(job, children):
        await cluster.delete_job(job.ref, outdated)
    return decision, created


async def limit_jobs(decision: Decision, job: Job, children: Observation, cluster: Cluster, now: datetime) -> Decision:
    """Adjust the deadlines of the Jobs, delete those that outlive what they were for, and return when the next will."""
    if decision.action is Action.NONE:
        for patch in outdated_deadlines(decision, job, children, now):
            await cluster.patch(patch)
        decision = await queue_jobs(decision, job, children, cluster)
        for leftover in leftover_jobs(job.status, children, now):
            await cluster.delete_job(job.ref, leftover)
    requeue_at = earliest(now, decision.requeue_at, next_leftover(job.status, children, now))
    return replace(decision, requeue_at=requeue_at or decision.requeue_at)


async def queue_jobs(decision: Decision, job: Job, children: Observation, cluster: Cluster) -> Decision:
    """Put suspended Jobs into the queue of their run; a queue that admits one meanwhile refuses the change."""
    try:
        for patch in missing_queue_labels(job, children):
            await cluster.patch(patch)
    except AdmissionDeniedError as error:
        return replace(decision, message=f"spec.queue: {error}", requeue_after=ADMISSION_DENIED_RETRY)
    return decision


async def refresh_run_config(  # noqa: PLR0913, PLR0917 (as apply_decision)
    decision: Decision,
    job: Job,
    children: Observation,
    cluster: Cluster,
    installation: Installation,
    report: Progress | None,
) -> None:
    """Give the newest checkpoint to the next start of an attempt that its queue has suspended; its ConfigMap stays."""
    attempt, plan = decision.attempt, job.status.plan
    train = children.train(attempt.number) if attempt and attempt.container_seconds else None
    if decision.phase is not Phase.QUEUED or attempt is None or train is None or plan is None:
        return
    message = classify_child(job, children.prepare, train.created_at).termination_message if children.prepare else None
    if message is None or message.prepared is None:
        return
    newest = derive_checkpoint(job.status, decision, report)
    if job.status.phase is Phase.QUEUED and newest == job.status.checkpoint:
        return
    known = {"checkpoint": newest, "last_report": report or job.status.last_report}
    checkpoint = checkpoint_of_restart(job.status.model_copy(update=known), train.suspended_at)
    published = reported_manifests(job.spec, job.status, attempt.number + 1)
    run = AttemptInputs(attempt.number, plan, message.prepared, checkpoint=checkpoint, published=published)
    installation = replace(installation, image=plan.image or installation.image)
    await cluster.ensure(build_run_config(Owner(job.ref, job.uid), job.spec, run, installation))


def build_children(decision: Decision, job: Job, installation: Installation) -> tuple[Manifest, ...]:
    """Return the children to create, the ConfigMap first, because the pod mounts it."""
    owner = Owner(job.ref, job.uid)
    image = job.status.plan.image if job.status.plan else None
    installation = replace(installation, image=image or installation.image)
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


def on_admission_denied(error: AdmissionDeniedError, job: Job) -> Decision:
    """Fail if the child can never be created; wait if a policy may change, or if one like it was valid before."""
    if error.permanent and not job.status.attempts:
        return Decision(Phase.FAILED, Reason.INVALID_SPEC, str(error))
    return Decision(Phase.PENDING, Reason.POD_REJECTED, str(error), requeue_after=ADMISSION_DENIED_RETRY)


async def delete_running_jobs(job: Job, children: Observation, cluster: Cluster) -> None:
    """Delete the Jobs that still run; their pods get the grace period to write a checkpoint.

    A Job whose pods have ended is kept, even if it is not marked as finished yet: it may hold the result of prepare.
    """
    for child in children.jobs:
        if child.holds_resources and not child.deleting:
            await cluster.delete_job(job.ref, child)


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


async def write_status(
    request: ReconcileRequest, decision: Decision, children: Observation | None, cluster: Cluster
) -> ReconcileResult:
    """Record an Event for a transition, and write the status if it changed; less of it if that is refused.

    Without the children, GPUs and their time stay as they are.
    """
    raw, previous = request.raw, request.previous_status
    report, now = request.context.last_report, request.context.now
    gpus = previous.gpus or 0
    await _warn_of_request_without_effect(request, cluster)
    claimed = {"operator": request.context.claimant.installation or None}
    statuses = (
        note_request(account_gpu_time(request, status, children), raw.retry_request).model_copy(update=claimed)
        for status in derive_alternatives(previous, decision, report, gpus=gpus, generation=raw.generation, now=now)
    )
    status = next(statuses)
    if (status.phase, status.reason) != (previous.phase, previous.reason):
        await cluster.record_event(build_event(Owner(raw.ref, raw.uid), raw.resource_version, status, now))
    while True:
        try:
            written = await write_if_changed(request, status, cluster)
        except InvalidStatusError as error:
            less = without_refused_reasons(status, str(error)) or next(statuses, None)
            if less is None:
                raise
            _log.error("the status of %s was refused, so less of it is written: %s", "/".join(raw.ref), error)
            status = less
        else:
            after = CLEAN_UP_AFTER.get(decision.phase, decision.requeue_after)
            delay = requeue_delay(now, decision.requeue_at, after, progressed=written is not None)
            return ReconcileResult(delay, written, status, request)
