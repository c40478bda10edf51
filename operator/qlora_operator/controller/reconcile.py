"""The story of one QLoRAJob: read, observe, decide, act, derive, write once."""

from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final

from pydantic import ValidationError

from qlora_api.job_ref import JobRef
from qlora_api.names import Phase, Reason, Role
from qlora_api.v1alpha1 import QLoRAJobSpec, QLoRAJobStatus, to_timedelta
from qlora_operator.cluster.interface import Cluster, NameTakenError, RefusedError
from qlora_operator.lifecycle import (
    Watch,
    avoided_nodes,
    is_terminal,
    next_action,
    plans_for_gpus,
    rejected,
    time_left,
)
from qlora_operator.lifecycle.retry_policy import AT_ONCE, LONGEST_WAIT
from qlora_operator.models import Action, Decision, Job, Manifest, Observation, RawJob, Run
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
from qlora_operator.status import acknowledge, derive_status, to_wire
from qlora_planner.validation import Violation

REFUSED_RETRY: Final = timedelta(minutes=1)
"""Quotas and policies are changed by people."""
NAME_TAKEN_RETRY: Final = timedelta(seconds=5)
"""The garbage collector needs seconds for the children of a deleted QLoRAJob."""


@dataclass(frozen=True)
class Turn:
    """One pass over one QLoRAJob: what it starts from."""

    raw: RawJob
    previous: QLoRAJobStatus
    watch: Watch


@dataclass(frozen=True)
class Outcome:
    """What a pass leaves to its caller."""

    requeue: timedelta | None = None
    """When time alone changes something."""
    written: str | None = None
    """The resourceVersion of the status, if one was written."""
    status: QLoRAJobStatus | None = None
    """The status as it stands; nothing when the QLoRAJob is gone, or has not been told of its first step."""
    turn: Turn | None = None
    """What the pass started from; nothing where the run had ended before."""


async def reconcile(
    ref: JobRef, cluster: Cluster, installation: Installation, watch: Watch, told: RawJob | None = None
) -> Outcome:
    """Bring the cluster to the spec, and tell the user where the run stands.

    What the watch has just told of the QLoRAJob may be late. It is enough for the first step, which is the same
    whenever it is taken, and to see that nothing is to be done; for anything else the QLoRAJob is read.
    """
    outcome = await pass_over(told, cluster, installation, watch, late=True) if told is not None else None
    if outcome is not None:
        return outcome
    raw = await cluster.read_job(ref)
    return (await pass_over(raw, cluster, installation, watch, late=False) if raw is not None else None) or Outcome()


async def pass_over(
    raw: RawJob, cluster: Cluster, installation: Installation, watch: Watch, *, late: bool
) -> Outcome | None:
    """Work on a QLoRAJob as it is, or may have been; nothing is done where that is late and something is to change."""
    if raw.deleting:
        return Outcome()
    turn = Turn(raw, QLoRAJobStatus.model_validate(raw.status), of_this_job(watch, raw))
    if is_terminal(turn.previous):
        return await settle(turn, cluster)
    spec = parse(raw)
    if isinstance(spec, Violation):
        return None if late else await publish(turn, rejected((spec,)), None, cluster)
    job = Job(raw.ref, raw.uid, raw.generation, raw.created_at, spec, turn.previous)
    seen = cluster.glimpse(raw)
    decision = next_action(job, seen, turn.watch)
    stands = confirms(decision, job, seen) or (begins(decision, job) and not (late and seen.jobs))
    if late and not stands:
        return None
    if not stands:
        seen = await look(job, raw, cluster)
        decision = next_action(job, seen, turn.watch)
    decision, created = await act(decision, job, seen, cluster, installation)
    if created and begins(decision, job):
        return Outcome(AT_ONCE)  # it is told when all who wait for their first step have taken it
    return await publish(turn, decision, spec.resources.nodes * spec.resources.gpus_per_node, cluster)


def begins(decision: Decision, job: Job) -> bool:
    """Whether a run takes its first step; children have derived names, so that a step taken before is taken once."""
    step = decision.action in {Action.PREPARE, Action.NONE} and decision.phase is Phase.PREPARING
    return step and job.status.phase is None


def confirms(decision: Decision, job: Job, seen: Observation) -> bool:
    """Whether a decision does nothing, ends nothing and learns nothing, so that a late view cannot spoil it."""
    facts = (decision.plan, decision.prepared, decision.result, decision.attempt and decision.attempt.reason)
    return (
        decision.action is Action.NONE
        and (decision.phase, decision.reason) == (job.status.phase, job.status.reason)
        and not any(facts)
        and not outdated_deadlines(job, seen)
    )


async def look(job: Job, raw: RawJob, cluster: Cluster) -> Observation:
    """Look at the children, and at the cluster's GPUs where a plan depends on them."""
    seen = await cluster.observe(raw)
    return replace(seen, gpu_nodes=await cluster.find_gpu_nodes()) if plans_for_gpus(job, seen) else seen


def of_this_job(watch: Watch, raw: RawJob) -> Watch:
    """Leave out a report that was meant for a deleted namesake."""
    return replace(watch, live=None) if watch.live and watch.live.updated_at < raw.created_at else watch


def parse(raw: RawJob) -> QLoRAJobSpec | Violation:
    """Read the spec, or say which field cannot be read."""
    try:
        return QLoRAJobSpec.model_validate(raw.spec)
    except ValidationError as error:
        sentences = (f"{'.'.join(('spec', *map(str, entry['loc'])))}: {entry['msg']}" for entry in error.errors())
        return Violation(Reason.INVALID_SPEC, "; ".join(sentences))


async def settle(turn: Turn, cluster: Cluster) -> Outcome:
    """Nothing starts again after the end; a Job that still holds a node is removed, and in the end every one."""
    raw, previous, now = turn.raw, turn.previous, turn.watch.now
    expires = expires_at(raw, previous)
    expired = expires is not None and now >= expires
    if superfluous(cluster.glimpse(raw), previous, expired=expired):
        for name in superfluous(await cluster.observe(raw), previous, expired=expired):
            await cluster.delete_job(raw.ref, name)
    status = acknowledge(previous, raw.generation)
    wait = expires - now if expires is not None and not expired else None
    return Outcome(wait, await _write(raw, previous, status, cluster), status)


def expires_at(raw: RawJob, status: QLoRAJobStatus) -> datetime | None:
    """Return when the children of a finished run are removed; None for a spec without spec.ttl, or an invalid one."""
    spec = parse(raw)
    if isinstance(spec, Violation) or spec.ttl is None or status.finished_at is None:
        return None
    return status.finished_at + min(to_timedelta(spec.ttl), LONGEST_WAIT)


def superfluous(seen: Observation, status: QLoRAJobStatus, *, expired: bool) -> list[str]:
    """Return the Jobs of a finished run to delete: all once they expired, before only what a failed run still holds."""
    failed = status.phase is Phase.FAILED
    return [child.name for child in seen.jobs if (expired or (failed and child.holds_resources)) and not child.deleting]


async def act(
    decision: Decision, job: Job, seen: Observation, cluster: Cluster, installation: Installation
) -> tuple[Decision, bool]:
    """Do what was decided, and say whether something was created; a name that is taken changes the decision."""
    created = False
    try:
        for child in build_children(decision, job, installation):
            created |= await cluster.ensure(child)
    except NameTakenError as error:
        return blocked(error), created
    except RefusedError as error:
        return refused(error), created
    if decision.action is Action.START_OVER:
        await start_over(job, seen, cluster)
    if decision.action is Action.STOP:
        await stop(job, seen, cluster)
    if decision.action is Action.FORGET and seen.prepare is not None and not seen.prepare.deleting:
        await cluster.delete_job(job.ref, seen.prepare.name)
    if decision.action is Action.NONE:
        for deadline in outdated_deadlines(job, seen):
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
        run = Run(
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


def blocked(error: NameTakenError) -> Decision:
    """Wait for an earlier run's child to leave; fail for a stranger's."""
    if error.leaving:
        return Decision(Phase.PENDING, Reason.ACCEPTED, str(error), retry_after=NAME_TAKEN_RETRY)
    return Decision(Phase.FAILED, Reason.INVALID_SPEC, str(error))


def refused(error: RefusedError) -> Decision:
    """Fail for what can never be created; wait for a quota or a policy to change."""
    if error.final:
        return Decision(Phase.FAILED, Reason.INVALID_SPEC, str(error))
    return Decision(Phase.PENDING, Reason.POD_REJECTED, str(error), retry_after=REFUSED_RETRY)


async def stop(job: Job, seen: Observation, cluster: Cluster) -> None:
    """Delete the Jobs that still run; their pods are given the time to write a checkpoint.

    One whose pods have ended is left alone, although it is not marked as finished yet: it may have what was prepared.
    """
    for child in seen.jobs:
        if child.holds_resources and not child.deleting:
            await cluster.delete_job(job.ref, child.name)


async def start_over(job: Job, seen: Observation, cluster: Cluster) -> None:
    """Delete every child Job; prepare goes first, so that a crash in between leaves the training Job as the reason."""
    for child in sorted(seen.jobs, key=lambda child: child.attempt):
        if not child.deleting:
            await cluster.delete_job(job.ref, child.name)


def outdated_deadlines(job: Job, seen: Observation) -> list[Manifest]:
    """Return what running training Jobs lack after a change of spec.deadlines.total."""
    seconds = seconds_left(job)
    return [
        build_deadline(job.ref, child.name, seconds)
        for child in seen.jobs
        if child.role is Role.TRAIN and not (child.finished or child.deleting) and child.deadline_seconds != seconds
    ]


def seconds_left(job: Job) -> int:
    """Return what ended attempts left of spec.deadlines.total, for the one under way; Kubernetes wants one at least."""
    ended = [attempt for attempt in job.status.attempts if attempt.reason]
    return max(int(time_left(job.spec.deadlines, ended).total_seconds()), 1)


async def publish(turn: Turn, decision: Decision, gpus: int | None, cluster: Cluster) -> Outcome:
    """Tell of a transition, and write the status if it differs."""
    raw, previous = turn.raw, turn.previous
    live, now = turn.watch.live, turn.watch.now
    status = derive_status(previous, decision, live, gpus=gpus, generation=raw.generation, now=now)
    if (status.phase, status.reason) != (previous.phase, previous.reason):
        await cluster.tell(build_event(Owner(raw.ref, raw.uid), raw.resource_version, status, now))
    written = await _write(raw, previous, status, cluster)
    return Outcome(_wait(decision, now), written, status, turn)


def _wait(decision: Decision, now: datetime) -> timedelta | None:
    """Say when to look again; a failed run is looked at once more, to give back what it holds."""
    if decision.phase is Phase.FAILED:
        return timedelta(0)
    if decision.recheck_at is not None:
        return max(decision.recheck_at - now, timedelta(0))
    return decision.retry_after


async def _write(raw: RawJob, previous: QLoRAJobStatus, status: QLoRAJobStatus, cluster: Cluster) -> str | None:
    return await cluster.write_status(raw, to_wire(status)) if status != previous else None
