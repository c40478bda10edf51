"""The conditions of a QLoRAJob; Ready, Reconciling and Stalled are what kstatus (Flux, Argo, Helm) reads."""

from collections.abc import Iterator
from datetime import datetime
from typing import Final, Literal, NamedTuple

from qlora_api.names import TERMINAL, ConditionType, Phase, Reason
from qlora_api.v1alpha1 import Condition, QLoRAJobStatus

Truth = Literal["True", "False", "Unknown"]


_SCHEDULED: Final[dict[Phase, Truth]] = {
    Phase.PENDING: "Unknown",
    Phase.PREPARING: "Unknown",
    Phase.QUEUED: "False",
    Phase.SCHEDULING: "False",
    Phase.SUSPENDED: "False",
    Phase.SUCCEEDED: "False",
    Phase.FAILED: "False",
}
"""Whether the training pod has a node; True in every other phase."""


class Claim(NamedTuple):
    """A condition without its times."""

    type: ConditionType
    status: Truth
    reason: Reason
    message: str


def derive_conditions(status: QLoRAJobStatus, now: datetime) -> tuple[Condition, ...]:
    """Return all conditions of a status that still has its last ones; a time changes with its status only."""
    known = {condition.type: condition for condition in status.conditions}
    phase, reason = status.phase or Phase.PENDING, status.reason or Reason.ACCEPTED
    return tuple(
        _stamp(claim, known.get(claim.type), status.observed_generation, now)
        for claim in (
            *_outcome(phase, reason, status.message or ""),
            _prepared(phase, reason, status),
            _scheduled(phase, reason, status, known.get(ConditionType.SCHEDULED)),
        )
    )


def _stamp(claim: Claim, before: Condition | None, generation: int, now: datetime) -> Condition:
    unchanged = before is not None and before.status == claim.status
    return Condition(
        **claim._asdict(),
        last_transition_time=before.last_transition_time if before and unchanged else now,
        observed_generation=generation,
    )


def _truth(holds: bool) -> Truth:
    return "True" if holds else "False"


def _outcome(phase: Phase, reason: Reason, message: str) -> Iterator[Claim]:
    finished, succeeded = phase in TERMINAL, phase is Phase.SUCCEEDED
    outcome: Truth = _truth(succeeded) if finished else "Unknown"
    yield Claim(ConditionType.READY, _truth(succeeded), reason, message)
    yield Claim(ConditionType.RECONCILING, _truth(not finished), reason, message)
    yield Claim(ConditionType.STALLED, _truth(phase is Phase.FAILED), reason, message)
    yield Claim(ConditionType.FINISHED, _truth(finished), reason, message)
    yield Claim(ConditionType.SUCCEEDED, outcome, reason, message)
    yield Claim(ConditionType.PUBLISHED, outcome, reason, message)
    yield Claim(ConditionType.SUSPENDED, _truth(phase is Phase.SUSPENDED), reason, message)


def _prepared(phase: Phase, reason: Reason, status: QLoRAJobStatus) -> Claim:
    if status.model is not None:
        return Claim(ConditionType.PREPARED, "True", Reason.PREPARED, "model, dataset and output were checked")
    truth: Truth = "False" if phase is Phase.FAILED else "Unknown"
    return Claim(ConditionType.PREPARED, truth, reason, status.message or "")


def _scheduled(phase: Phase, reason: Reason, status: QLoRAJobStatus, before: Condition | None) -> Claim:
    """A pod that had a node once stays scheduled when the run is over."""
    if phase in TERMINAL and before is not None and before.status == "True":
        return Claim(before.type, before.status, before.reason, before.message)
    return Claim(ConditionType.SCHEDULED, _SCHEDULED.get(phase, "True"), reason, status.message or "")
