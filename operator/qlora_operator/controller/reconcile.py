"""The story of one QLoRAJob: read, observe, decide, act, derive, write once."""

from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final

from pydantic import ValidationError

from qlora_api.job_ref import JobRef
from qlora_api.names import Phase, Role
from qlora_api.reasons import Reason
from qlora_api.v1alpha1 import QLoRAJobSpec, QLoRAJobStatus, to_timedelta
from qlora_operator.cluster.interface import AdmissionDeniedError, Cluster, NameConflictError
from qlora_operator.lifecycle import (
    ReconcileContext,
    avoided_nodes,
    decide,
    is_terminal,
    needs_gpu_nodes,
    rejected,
    time_left,
)
from qlora_operator.lifecycle.retry_policy import AT_ONCE, LONGEST_WAIT
from qlora_operator.models import Action, AttemptInputs, Decision, Job, Manifest, Observation, RawJob
from qlora_operator.resources import (
    Installation,
    Owner,
    build_deadline,
    build_event,
    build_prepare_config,
    build_prepare_job,
    build_run_config,
    build_service,
    build_train_job,
)
from qlora_operator.status import derive_status, to_wire, with_observed_generation
from qlora_planner.validation import Violation

ADMISSION_DENIED_RETRY: Final = timedelta(minutes=1)
"""Quotas and policies are changed by people."""
NAME_CONFLICT_RETRY: Final = timedelta(seconds=5)
"""The garbage collector needs seconds for the children of a deleted QLoRAJob."""


@dataclass(frozen=True)
class ReconcileRequest:
    """One pass over one QLoRAJob: what it starts from."""

    raw: RawJob
    previous_status: QLoRAJobStatus
    context: ReconcileContext


@dataclass(frozen=True)
class ReconcileResult:
    """What a pass leaves to its caller."""

    requeue_after: timedelta | None = None
    """When time alone changes something."""
    written_version: str | None = None
    """The resourceVersion of the status, if one was written."""
    status: QLoRAJobStatus | None = None
    """The status as it stands; nothing when the QLoRAJob is gone, or has not been told of its first step."""
    request: ReconcileRequest | None = None
    """What the pass started from; nothing where the run had ended before."""


async def reconcile(
    ref: JobRef, cluster: Cluster, installation: Installation, context: ReconcileContext, cached: RawJob | None = None
) -> ReconcileResult:
    """Bring the cluster to the spec, and tell the user where the run stands.

    What the watch has just told of the QLoRAJob may be late. It is enough for the first step, which is the same
    whenever it is taken, and to see that nothing is to be done; for anything else the QLoRAJob is read.
    """
    outcome = (
        await reconcile_once(cached, cluster, installation, context, from_cache=True) if cached is not None else None
    )
    if outcome is not None:
        return outcome
    raw = await cluster.read_job(ref)
    return (
        await reconcile_once(raw, cluster, installation, context, from_cache=False) if raw is not None else None
    ) or ReconcileResult()


async def reconcile_once(
    raw: RawJob, cluster: Cluster, installation: Installation, context: ReconcileContext, *, from_cache: bool
) -> ReconcileResult | None:
    """Work on a QLoRAJob as it is, or may have been; nothing is done where that is late and something is to change."""
    if raw.deleting:
        return ReconcileResult()
    turn = ReconcileRequest(raw, QLoRAJobStatus.model_validate(raw.status), without_stale_report(context, raw))
    if is_terminal(turn.previous_status):
        return await reconcile_finished(turn, cluster)
    spec = parse(raw)
    if isinstance(spec, Violation):
        return None if from_cache else await write_status(turn, rejected((spec,)), None, cluster)
    job = Job(raw.ref, raw.uid, raw.generation, raw.created_at, spec, turn.previous_status)
    seen = cluster.children_from_cache(raw)
    decision = decide(job, seen, turn.context)
    stands = is_noop(decision, job, seen) or (is_first_step(decision, job) and not (from_cache and seen.jobs))
    if from_cache and not stands:
        return None
    if not stands:
        seen = await list_children_and_gpu_nodes(job, raw, cluster)
        decision = decide(job, seen, turn.context)
    decision, created = await apply_decision(decision, job, seen, cluster, installation)
    if created and is_first_step(decision, job):
        return ReconcileResult(AT_ONCE)  # it is told when all who wait for their first step have taken it
    return await write_status(turn, decision, spec.resources.nodes * spec.resources.gpus_per_node, cluster)


def is_first_step(decision: Decision, job: Job) -> bool:
    """Whether a run takes its first step; children have derived names, so that a step taken before is taken once."""
    step = decision.action in {Action.PREPARE, Action.NONE} and decision.phase is Phase.PREPARING
    return step and job.status.phase is None


def is_noop(decision: Decision, job: Job, children: Observation) -> bool:
    """Whether a decision does nothing, ends nothing and learns nothing, so that a late view cannot spoil it."""
    facts = (decision.plan, decision.prepared, decision.result, decision.attempt and decision.attempt.reason)
    return (
        decision.action is Action.NONE
        and (decision.phase, decision.reason) == (job.status.phase, job.status.reason)
        and not any(facts)
        and not outdated_deadlines(job, children)
    )


async def list_children_and_gpu_nodes(job: Job, raw: RawJob, cluster: Cluster) -> Observation:
    """Look at the children, and at the cluster's GPUs where a plan depends on them."""
    seen = await cluster.list_children(raw)
    return replace(seen, gpu_nodes=await cluster.find_gpu_nodes()) if needs_gpu_nodes(job, seen) else seen


def without_stale_report(context: ReconcileContext, raw: RawJob) -> ReconcileContext:
    """Leave out a report that was meant for a deleted namesake."""
    return (
        replace(context, last_report=None)
        if context.last_report and context.last_report.updated_at < raw.created_at
        else context
    )


def parse(raw: RawJob) -> QLoRAJobSpec | Violation:
    """Read the spec, or say which field cannot be read."""
    try:
        return QLoRAJobSpec.model_validate(raw.spec)
    except ValidationError as error:
        sentences = (f"{'.'.join(('spec', *map(str, entry['loc'])))}: {entry['msg']}" for entry in error.errors())
        return Violation(Reason.INVALID_SPEC, "; ".join(sentences))


async def reconcile_finished(request: ReconcileRequest, cluster: Cluster) -> ReconcileResult:
    """Nothing starts again after the end; a Job that still holds a node is removed, and in the end every one."""
    raw, previous, now = request.raw, request.previous_status, request.context.now
    expires = expires_at(raw, previous)
    expired = expires is not None and now >= expires
    if jobs_to_delete(cluster.children_from_cache(raw), previous, expired=expired):
        for name in jobs_to_delete(await cluster.list_children(raw), previous, expired=expired):
            await cluster.delete_job(raw.ref, name)
    status = with_observed_generation(previous, raw.generation)
    wait = expires - now if expires is not None and not expired else None
    return ReconcileResult(wait, await _write_if_changed(raw, previous, status, cluster), status)


def expires_at(raw: RawJob, status: QLoRAJobStatus) -> datetime | None:
    """Return when the children of a finished run are removed; None for a spec without spec.ttl, or an invalid one."""
    spec = parse(raw)
    if isinstance(spec, Violation) or spec.ttl is None or status.finished_at is None:
        return None
    return status.finished_at + min(to_timedelta(spec.ttl), LONGEST_WAIT)


def jobs_to_delete(children: Observation, status: QLoRAJobStatus, *, expired: bool) -> list[str]:
    """Return the Jobs of a finished run to delete: all once they expired, before only what a failed run still holds."""
    failed = status.phase is Phase.FAILED
    return [
        child.name for child in children.jobs if (expired or (failed and child.holds_resources)) and not child.deleting
    ]


async def apply_decision(
    decision: Decision, job: Job, children: Observation, cluster: Cluster, installation: Installation
) -> tuple[Decision, bool]:
    """Do what was decided, and say whether something was created; a name that is taken changes the decision."""
    created = False
    try:
        for child in build_children(decision, job, installation):
            created |= await cluster.ensure(child)
    except NameConflictError as error:
        return on_name_conflict(error), created
    except AdmissionDeniedError as error:
        return on_admission_denied(error), created
    if decision.action is Action.DELETE_ALL_JOBS:
        await delete_all_jobs(job, children, cluster)
    if decision.action is Action.DELETE_RUNNING_JOBS:
        await delete_running_jobs(job, children, cluster)
    if decision.action is Action.DELETE_PREPARE_JOB and children.prepare is not None and not children.prepare.deleting:
        await cluster.delete_job(job.ref, children.prepare.name)
    if decision.action is Action.NONE:
        for deadline in outdated_deadlines(job, children):
            await cluster.patch(deadline)
    return decision, created


def build_children(decision: Decision, job: Job, installation: Installation) -> tuple[Manifest, ...]:
    """Return the children to create: the configuration first, because a pod waits for it."""
    owner = Owner(job.ref, job.uid)
    if decision.action is Action.PREPARE:
        return (
            build_prepare_config(owner, job.spec, installation),
            build_prepare_job(owner, job.spec, installation),
        )
    if decision.action is Action.TRAIN and decision.plan and decision.prepared and decision.attempt:
        run = AttemptInputs(
            decision.attempt.number,
            decision.plan,
            decision.prepared,
            seconds_left=seconds_left(job),
            avoided_nodes=avoided_nodes(job.status.attempts),
        )
        return (
            build_run_config(owner, job.spec, run, installation),
            *([build_service(owner, run.attempt)] if run.plan.nodes > 1 else []),
            build_train_job(owner, job.spec, run, installation),
        )
    return ()


def on_name_conflict(error: NameConflictError) -> Decision:
    """Wait for an earlier run's child to leave; fail for a stranger's."""
    if error.being_deleted:
        return Decision(Phase.PENDING, Reason.ACCEPTED, str(error), requeue_after=NAME_CONFLICT_RETRY)
    return Decision(Phase.FAILED, Reason.INVALID_SPEC, str(error))


def on_admission_denied(error: AdmissionDeniedError) -> Decision:
    """Fail for what can never be created; wait for a quota or a policy to change."""
    if error.permanent:
        return Decision(Phase.FAILED, Reason.INVALID_SPEC, str(error))
    return Decision(Phase.PENDING, Reason.POD_REJECTED, str(error), requeue_after=ADMISSION_DENIED_RETRY)


async def delete_running_jobs(job: Job, children: Observation, cluster: Cluster) -> None:
    """Delete the Jobs that still run; their pods are given the time to write a checkpoint.

    One whose pods have ended is left alone, although it is not marked as finished yet: it may have what was prepared.
    """
    for child in children.jobs:
        if child.holds_resources and not child.deleting:
            await cluster.delete_job(job.ref, child.name)


async def delete_all_jobs(job: Job, children: Observation, cluster: Cluster) -> None:
    """Delete every child Job; prepare goes first, so that a crash in between leaves the training Job as the reason."""
    for child in sorted(children.jobs, key=lambda child: child.attempt):
        if not child.deleting:
            await cluster.delete_job(job.ref, child.name)


def outdated_deadlines(job: Job, children: Observation) -> list[Manifest]:
    """Return what running training Jobs lack after a change of spec.deadlines.total."""
    seconds = seconds_left(job)
    return [
        build_deadline(job.ref, child.name, seconds)
        for child in children.jobs
        if child.role is Role.TRAIN and not (child.finished or child.deleting) and child.deadline_seconds != seconds
    ]


def seconds_left(job: Job) -> int:
    """Return what ended attempts left of spec.deadlines.total, for the one under way; Kubernetes wants one at least."""
    ended = [attempt for attempt in job.status.attempts if attempt.reason]
    return max(int(time_left(job.spec.deadlines, ended).total_seconds()), 1)


async def write_status(
    request: ReconcileRequest, decision: Decision, gpus: int | None, cluster: Cluster
) -> ReconcileResult:
    """Tell of a transition, and write the status if it differs."""
    raw, previous = request.raw, request.previous_status
    live, now = request.context.last_report, request.context.now
    status = derive_status(previous, decision, live, gpus=gpus, generation=raw.generation, now=now)
    if (status.phase, status.reason) != (previous.phase, previous.reason):
        await cluster.record_event(build_event(Owner(raw.ref, raw.uid), raw.resource_version, status, now))
    written = await _write_if_changed(raw, previous, status, cluster)
    return ReconcileResult(_requeue_after(decision, now), written, status, request)


def _requeue_after(decision: Decision, now: datetime) -> timedelta | None:
    """Say when to look again; a failed run is looked at once more, to give back what it holds."""
    if decision.phase is Phase.FAILED:
        return timedelta(0)
    if decision.requeue_at is not None:
        return max(decision.requeue_at - now, timedelta(0))
    return decision.requeue_after


async def _write_if_changed(
    raw: RawJob, previous: QLoRAJobStatus, status: QLoRAJobStatus, cluster: Cluster
) -> str | None:
    return await cluster.write_status(raw, to_wire(status)) if status != previous else None
