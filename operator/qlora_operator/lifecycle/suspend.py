"""spec.suspend: running Jobs are stopped after a last checkpoint, and nothing is started."""

from typing import Final

from qlora_api.names import Phase, Role
from qlora_api.reasons import Reason
from qlora_operator.lifecycle.context import ReconcileContext
from qlora_operator.lifecycle.gang import classify_child
from qlora_operator.lifecycle.prepare_retries import current_preparation, next_preparation
from qlora_operator.lifecycle.retry_policy import AT_ONCE
from qlora_operator.lifecycle.train_phase import end_attempt, observed_attempt
from qlora_operator.models import Action, Decision, Job, Observation, Stage

_STOPPING: Final = "training is being stopped: it writes a checkpoint and ends"
_STOPPING_PREPARATION: Final = "preparation is being stopped"
_RUNNING: Final = frozenset({Stage.WAITING, Stage.RUNNING})


def suspend(job: Job, children: Observation, number: int, context: ReconcileContext) -> Decision | None:
    """Stop running Jobs if spec.suspend is true; an attempt that has already ended is recorded first."""
    if not job.spec.suspend:
        return None
    train = children.train(number)
    if train is not None and not train.deleting:
        if classify_child(job, train, context.now).stage not in _RUNNING:
            return None
        ended = end_attempt(observed_attempt(job, train, context), Reason.SUSPENDED_BY_USER, _STOPPING, context.now)
        return Decision(Phase.SUSPENDED, Reason.SUSPENDED_BY_USER, _STOPPING, attempt=ended, requeue_after=AT_ONCE)
    if train is not None or any(attempt.number == number for attempt in job.status.attempts):
        return None
    # Time in suspension is no time of patience: a preparation that has failed begins anew.
    current = current_preparation(job.status, children)
    preparation = next_preparation(current) if current.failures else None
    if running := {child.role for child in children.jobs if child.holds_resources}:
        message = _STOPPING if Role.TRAIN in running else _STOPPING_PREPARATION
        return Decision(
            Phase.SUSPENDED, Reason.SUSPENDED_BY_USER, message, Action.DELETE_RUNNING_JOBS, preparation=preparation
        )
    return Decision(Phase.SUSPENDED, Reason.SUSPENDED_BY_USER, _describe(job), preparation=preparation)


def _describe(job: Job) -> str:
    checkpoint = job.status.checkpoint
    where = f"the checkpoint of step {checkpoint.step} is in {checkpoint.uri}; " if checkpoint else ""
    return f"spec.suspend is true: no pod runs; {where}set it to false to resume"
