"""The conditions of a QLoRAJob; kstatus (Flux, Argo CD, Helm) reads Ready, Reconciling and Stalled."""

from collections.abc import Iterator
from datetime import datetime
from typing import Final, Literal, NamedTuple

from qlora_api.names import TERMINAL, ConditionType, Phase
from qlora_api.reasons import Reason
from qlora_api.v1alpha1 import Condition, QLoRAJobStatus

ConditionStatus = Literal["True", "False", "Unknown"]


_SCHEDULED: Final[dict[Phase, ConditionStatus]] = {
    Phase.PENDING: "Unknown",
    Phase.PREPARING: "Unknown",
    Phase.QUEUED: "False",
    Phase.SCHEDULING: "False",
    Phase.SUSPENDED: "False",
    Phase.SUCCEEDED: "False",
    Phase.FAILED: "False",
}
"""Status of the condition Scheduled; True in every other phase."""


class DesiredCondition(NamedTuple):
    """A condition without its times."""

    type: ConditionType
    status: ConditionStatus
    reason: Reason
    message: str


def derive_conditions(status: QLoRAJobStatus, now: datetime) -> tuple[Condition, ...]:
    """Return all conditions for a status that still holds the previous ones.

    lastTransitionTime changes only with the status of a condition.
    """
    previous = {condition.type: condition for condition in status.conditions}
    phase, reason = status.phase or Phase.PENDING, status.reason or Reason.ACCEPTED
    return tuple(
        _with_transition_time(desired, previous.get(desired.type), status.observed_generation, now)
        for desired in (
            *_outcome_conditions(phase, reason, status.message or ""),
            _prepared(phase, reason, status),
            _scheduled(phase, reason, status, previous.get(ConditionType.SCHEDULED)),
        )
    )


def _with_transition_time(
    desired: DesiredCondition, previous: Condition | None, generation: int, now: datetime
) -> Condition:
    unchanged = previous is not None and previous.status == desired.status
    return Condition(
        **desired._asdict(),
        last_transition_time=previous.last_transition_time if previous and unchanged else now,
        observed_generation=generation,
    )


def _to_condition_status(holds: bool) -> ConditionStatus:
    return "True" if holds else "False"


def _outcome_conditions(phase: Phase, reason: Reason, message: str) -> Iterator[DesiredCondition]:
    finished, succeeded = phase in TERMINAL, phase is Phase.SUCCEEDED
    outcome: ConditionStatus = _to_condition_status(succeeded) if finished else "Unknown"
    yield DesiredCondition(ConditionType.READY, _to_condition_status(succeeded), reason, message)
    yield DesiredCondition(ConditionType.RECONCILING, _to_condition_status(not finished), reason, message)
    yield DesiredCondition(ConditionType.STALLED, _to_condition_status(phase is Phase.FAILED), reason, message)
    yield DesiredCondition(ConditionType.FINISHED, _to_condition_status(finished), reason, message)
    yield DesiredCondition(ConditionType.SUCCEEDED, outcome, reason, message)
    yield DesiredCondition(ConditionType.PUBLISHED, outcome, reason, message)
    yield DesiredCondition(ConditionType.SUSPENDED, _to_condition_status(phase is Phase.SUSPENDED), reason, message)


def _prepared(phase: Phase, reason: Reason, status: QLoRAJobStatus) -> DesiredCondition:
    if status.model is not None:
        return DesiredCondition(
            ConditionType.PREPARED, "True", Reason.PREPARED, "model, dataset and output were checked"
        )
    condition_status: ConditionStatus = "False" if phase is Phase.FAILED else "Unknown"
    return DesiredCondition(ConditionType.PREPARED, condition_status, reason, status.message or "")


def _scheduled(phase: Phase, reason: Reason, status: QLoRAJobStatus, previous: Condition | None) -> DesiredCondition:
    """Return the condition Scheduled; once a run is over, it stays True if a pod ever had a node."""
    if phase in TERMINAL and previous is not None and previous.status == "True":
        return DesiredCondition(previous.type, previous.status, previous.reason, previous.message)
    return DesiredCondition(ConditionType.SCHEDULED, _SCHEDULED.get(phase, "True"), reason, status.message or "")
