"""From the spec, the last status and the children to where the run stands and what comes next.

Facts reach the status before anything relies on them, so a crash between any two writes loses nothing: a training Job
is created only when model, output and plan are on record, and a Job whose last word is lost is first recorded as lost,
then deleted, then prepared anew. That next prepare finds the manifest if the result was published.
"""

from datetime import datetime, timedelta
from typing import Final

from qlora_api.names import TERMINAL, Phase, Reason, Role, prepare_job_name, train_job_name
from qlora_api.prepared import Prepared
from qlora_api.v1alpha1 import Attempt, Plan, Progress, QLoRAJobStatus, to_timedelta
from qlora_operator.plan import make_plan
from qlora_operator.plan.offer import read_offer
from qlora_operator.plan.sizing import DoesNotFitError
from qlora_operator.recovery.causes import describe_missing_pod
from qlora_operator.recovery.gang import judge
from qlora_operator.recovery.retries import (
    MOST_ATTEMPTS,
    REMEDIES,
    Remedy,
    choose_remedy,
    retry_at,
    shrink,
    used_attempts,
)
from qlora_operator.rules import check
from qlora_operator.values import Action, ChildJob, Decision, Job, Manifest, Observation, Stage, Verdict, Violation

MAX_LOST_ATTEMPTS: Final = 3
"""After this many training Jobs that ended without a last word, something removes them: give up."""
LONGEST_WAIT: Final = timedelta(days=3650)
"""9999999d is a valid duration, and ends after the last date there is."""
PREPARE_PAUSE: Final = timedelta(seconds=15)
"""Between two preparations, where an object store or a hub did not answer."""
MAX_ATTEMPT_MESSAGE: Final = 4096
"""Bound of status.attempts[].message."""

AT_ONCE: Final = timedelta(0)
"""The next step waits for nothing but this one's record."""

_PREPARATION_DONE: Final = frozenset({Reason.PREPARED, Reason.ALREADY_PUBLISHED})
"""Last words with which a preparation succeeds."""
_LIVE: Final = {
    Phase.TRAINING: Reason.TRAINING,
    Phase.EVALUATING: Reason.EVALUATING,
    Phase.PUBLISHING: Reason.PUBLISHING,
}
"""Phases that a running training pod reports."""


def rejected(violations: tuple[Violation, ...]) -> Decision:
    """Fail for what only the user can correct."""
    return Decision(Phase.FAILED, violations[0].reason, "; ".join(violation.message for violation in violations))


def next_action(job: Job, seen: Observation, live: Progress | None, now: datetime) -> Decision:
    """Say where the run stands and what comes next."""
    if violations := check(job.spec):
        return rejected(violations)
    if decision := _clear_away(job.status, seen):
        return decision
    number = 1 + max((attempt.number for attempt in job.status.attempts if attempt.reason), default=0)
    if train := seen.train(number):
        return _follow_training(job, train, live, now)
    if _vanished(job.status, number):
        return _lose(_attempt(job, number), now)
    if decision := _hold_back(job.status, seen, number, now):
        return decision
    return _follow_preparation(job, seen, number, now)


def plans_for_gpus(job: Job, seen: Observation) -> bool:
    """Return whether the next decision may be a plan that depends on the cluster's GPUs."""
    prepared = seen.prepare is not None and seen.prepare.complete
    trains = any(child.role is Role.TRAIN for child in seen.jobs)
    return bool(job.spec.resources.gpus_per_node) and prepared and not trains


def _attempt(job: Job, number: int) -> Attempt:
    """Return an attempt that follows the plan on record."""
    plan = job.status.plan
    return Attempt(
        number=number,
        job=train_job_name(job.ref.name, number),
        micro_batch_size=plan.micro_batch_size if plan else None,
    )


def _clear_away(status: QLoRAJobStatus, seen: Observation) -> Decision | None:
    """Delete Jobs that speak of a lost attempt, or that are being deleted; wait until they are gone."""
    if not any(_is_stale(child, status) for child in seen.jobs):
        return None
    message = "a training Job was lost without a last word; the run is prepared again, and finds what was published"
    return Decision(Phase.PREPARING, Reason.PREPARING, message, Action.START_OVER)


def _is_stale(child: ChildJob, status: QLoRAJobStatus) -> bool:
    lost = [attempt for attempt in status.attempts if attempt.reason is Reason.POD_LOST]
    if child.role is Role.TRAIN:
        return child.deleting or any(attempt.number == child.attempt for attempt in lost)
    return child.deleting or any(attempt.finished_at and child.created_at <= attempt.finished_at for attempt in lost)


def _vanished(status: QLoRAJobStatus, number: int) -> bool:
    """Whether an attempt is on record as running, although nobody sees its Job."""
    return any(attempt.number == number for attempt in status.attempts)


def _lose(attempt: Attempt, now: datetime) -> Decision:
    message = f"Job {attempt.job} is gone without a last word"
    lost = attempt.model_copy(update={"reason": Reason.POD_LOST, "message": message, "finished_at": now})
    if lost.number >= MAX_LOST_ATTEMPTS:
        again = f"{message}, as were {lost.number - 1} before it; see what deletes Jobs or pods in this namespace"
        return Decision(Phase.FAILED, Reason.POD_LOST, again, attempt=lost)
    message = f"{message}; the run is prepared again"
    return Decision(Phase.PREPARING, Reason.POD_LOST, message, attempt=lost, retry_after=AT_ONCE)


def _hold_back(status: QLoRAJobStatus, seen: Observation, number: int, now: datetime) -> Decision | None:
    """Let the pods of the attempt before end first, and a service recover."""
    reason, message = status.reason or Reason.SCHEDULING, status.message or ""
    if any(child.role is Role.TRAIN and child.attempt < number and not child.finished for child in seen.jobs):
        return Decision(Phase.SCHEDULING, reason, message)
    at = retry_at(status.attempts)
    return Decision(Phase.SCHEDULING, reason, message, recheck_at=at) if at is not None and now < at else None


def _follow_preparation(job: Job, seen: Observation, number: int, now: datetime) -> Decision:
    prepare = seen.prepare
    if prepare is None:
        message = describe_missing_pod(prepare_job_name(job.ref.name))
        return Decision(Phase.PREPARING, Reason.PREPARING, message, Action.PREPARE)
    verdict = judge(prepare, startup_of(job), now)
    if verdict.stage is Stage.LOST:
        return Decision(Phase.PREPARING, Reason.PREPARING, verdict.message, Action.START_OVER)
    if verdict.stage is not Stage.ENDED:
        message = verdict.message or "model, dataset and output are being checked"
        return Decision(Phase.PREPARING, verdict.reason, message, recheck_at=verdict.recheck_at)
    prepared = verdict.word.prepared if verdict.word else None
    if verdict.reason not in _PREPARATION_DONE or prepared is None:
        return _prepare_again(job, prepare, verdict, now) or _fail(verdict)
    return _after_preparation(job, prepared, seen.gpu_nodes, number)


def _prepare_again(job: Job, prepare: ChildJob, verdict: Verdict, now: datetime) -> Decision | None:
    """Give what recovers by itself some time, and prepare anew; it holds no GPU, and ends with deadlines.startup."""
    if REMEDIES.get(verdict.reason) is not Remedy.RESUME or now >= job.created_at + startup_of(job):
        return None
    again = _ended_at(prepare, now) + PREPARE_PAUSE
    message = f"{verdict.message}; it is prepared again"
    if now < again:
        return Decision(Phase.PREPARING, verdict.reason, message, recheck_at=again)
    return Decision(Phase.PREPARING, verdict.reason, message, Action.START_OVER)


def startup_of(job: Job) -> timedelta:
    """Return spec.deadlines.startup, within what a calendar can add."""
    return min(to_timedelta(job.spec.deadlines.startup), LONGEST_WAIT)


def _fail(verdict: Verdict) -> Decision:
    """End the run; a good reason without its facts is the trainer's mistake."""
    if verdict.reason in {*_PREPARATION_DONE, Reason.PUBLISHED}:
        return Decision(Phase.FAILED, Reason.TRAINER_ERROR, f"the last word {verdict.reason} came without its facts")
    return Decision(Phase.FAILED, verdict.reason, verdict.message)


def _after_preparation(job: Job, prepared: Prepared, gpu_nodes: tuple[Manifest, ...], number: int) -> Decision:
    if prepared.published is not None:
        message = f"the same result was published before as {prepared.published.adapter}"
        return Decision(
            Phase.SUCCEEDED, Reason.ALREADY_PUBLISHED, message, prepared=prepared, result=prepared.published
        )
    try:
        plan = _keep_plan(job, prepared, gpu_nodes)
    except DoesNotFitError as error:
        message = f"spec.model.uri: {prepared.model.architecture} {error}"
        return Decision(Phase.FAILED, Reason.DOES_NOT_FIT, message, prepared=prepared)
    if job.status.plan != plan or job.status.output is None:
        message = "model, dataset and output were checked"
        return Decision(Phase.SCHEDULING, Reason.PREPARED, message, plan=plan, prepared=prepared, retry_after=AT_ONCE)
    attempt = Attempt(number=number, job=train_job_name(job.ref.name, number), micro_batch_size=plan.micro_batch_size)
    return Decision(
        Phase.SCHEDULING,
        Reason.SCHEDULING,
        describe_missing_pod(attempt.job),
        Action.TRAIN,
        plan=plan,
        prepared=prepared,
        attempt=attempt,
    )


def _keep_plan(job: Job, prepared: Prepared, gpu_nodes: tuple[Manifest, ...]) -> Plan:
    """Keep a plan on record, so that neither a newer operator nor other nodes change a run halfway."""
    output = job.status.output
    if job.status.plan is not None and output is not None and output.digest == prepared.digest:
        return job.status.plan
    return make_plan(job.spec, prepared, read_offer(gpu_nodes, job.spec.resources))


def _follow_training(job: Job, train: ChildJob, live: Progress | None, now: datetime) -> Decision:
    verdict = judge(train, startup_of(job), now)
    attempt = _record(job, train)
    if verdict.stage is Stage.LOST:
        return _lose(attempt, now)
    if verdict.stage is Stage.WAITING:
        return Decision(
            Phase.SCHEDULING, verdict.reason, verdict.message, attempt=attempt, recheck_at=verdict.recheck_at
        )
    if verdict.stage is Stage.RUNNING:
        phase = live.phase if live and live.phase in _LIVE else Phase.TRAINING
        return Decision(phase, _LIVE[phase], verdict.message or _describe_run(train), attempt=attempt)
    return _end_training(job, verdict, attempt, _ended_at(train, now))


def _record(job: Job, train: ChildJob) -> Attempt:
    pod = train.pod
    return _attempt(job, train.attempt).model_copy(update={"started_at": pod.started_at if pod else None})


def _describe_run(train: ChildJob) -> str:
    if len(train.pods) > 1:
        return f"{len(train.pods)} pods run on {len({pod.node for pod in train.pods})} nodes"
    return f"pod {train.pod.name} runs on node {train.pod.node}" if train.pod else f"Job {train.name} runs"


def _ended_at(train: ChildJob, now: datetime) -> datetime:
    ends = [pod.exit.finished_at for pod in train.pods if pod.exit and pod.exit.finished_at]
    return min(ends, default=now)


def _end_training(job: Job, verdict: Verdict, attempt: Attempt, at: datetime) -> Decision:
    result = verdict.word.result if verdict.word else None
    if verdict.reason is Reason.PUBLISHED and result is not None:
        message = f"the adapter is published as {result.adapter}"
        ended = attempt.model_copy(update={"reason": Reason.PUBLISHED, "finished_at": at})
        return Decision(Phase.SUCCEEDED, Reason.PUBLISHED, message, result=result, attempt=ended)
    failed = _fail(verdict)
    ended = attempt.model_copy(
        update={"reason": failed.reason, "message": failed.message[:MAX_ATTEMPT_MESSAGE], "finished_at": at}
    )
    return _try_again(job, verdict, ended) or Decision(failed.phase, failed.reason, failed.message, attempt=ended)


def _try_again(job: Job, verdict: Verdict, ended: Attempt) -> Decision | None:
    """Start another attempt where that can mend the failure; it goes on from the last checkpoint."""
    plan, attempts = job.status.plan, (*job.status.attempts[: ended.number - 1], ended)
    remedy = choose_remedy(verdict, plan) if plan else None
    if remedy is None or plan is None or not _may_try(job, attempts):
        return None
    plan = shrink(plan, ended.number) if remedy is Remedy.SHRINK else plan
    message = f"attempt {ended.number} ended: {verdict.message}; the next one goes on from the last checkpoint"
    return Decision(Phase.SCHEDULING, verdict.reason, message, plan=plan, attempt=ended, retry_after=AT_ONCE)


def _may_try(job: Job, attempts: tuple[Attempt, ...]) -> bool:
    return used_attempts(attempts) < job.spec.retries.max_attempts and len(attempts) < MOST_ATTEMPTS


def is_terminal(status: QLoRAJobStatus) -> bool:
    """Whether the run is over for ever."""
    return status.phase in TERMINAL
