"""Status as other tools read it: kstatus, the columns, the schema."""

from datetime import timedelta
from typing import Any

import pytest

from qlora_api.names import RUNNING, TERMINAL, ConditionType, Phase
from qlora_api.reasons import Reason
from qlora_api.units import format_duration
from qlora_api.v1alpha1 import Attempt, Progress, QLoRAJobStatus
from qlora_api.v1alpha1.status import MAX_ATTEMPT_MESSAGE, MAX_MESSAGE, MAX_SUMMARY
from qlora_operator.models import Decision
from qlora_operator.status import derive_status, to_wire, with_observed_generation
from qlora_operator.status.formatting import format_number, format_step
from tests.make import (
    NOW,
    make_plan_status,
    make_prepared,
    make_result,
)

REASONS = {
    Phase.PENDING: Reason.ACCEPTED,
    Phase.PREPARING: Reason.PREPARING,
    Phase.QUEUED: Reason.QUEUED,
    Phase.SCHEDULING: Reason.UNSCHEDULABLE,
    Phase.TRAINING: Reason.TRAINING,
    Phase.EVALUATING: Reason.EVALUATING,
    Phase.PUBLISHING: Reason.PUBLISHING,
    Phase.SUSPENDED: Reason.SUSPENDED_BY_USER,
    Phase.SUCCEEDED: Reason.PUBLISHED,
    Phase.FAILED: Reason.CUDA_OUT_OF_MEMORY,
}


def kstatus(generation: int, status: dict[str, Any]) -> str:
    """The generic rules of cli-utils, held against the library itself in tests/integration/test_kstatus.py."""
    if status.get("observedGeneration", generation) != generation:
        return "InProgress"
    conditions = {entry["type"]: entry["status"] for entry in status.get("conditions", ())}
    abnormal = [kind for kind in conditions if kind in {"Reconciling", "Stalled"} and conditions[kind] == "True"]
    if abnormal:
        return {"Reconciling": "InProgress", "Stalled": "Failed"}[abnormal[0]]
    return "Current" if conditions.get("Ready", "True") == "True" else "InProgress"


def status_in(phase: Phase, previous: QLoRAJobStatus | None = None, **change: Any) -> QLoRAJobStatus:
    decision = Decision(phase, REASONS[phase], "because", **change)
    return derive_status(previous or QLoRAJobStatus(), decision, None, gpus=1, generation=1, now=NOW)


@pytest.mark.parametrize("phase", Phase)
def test_kstatus_of_every_phase(phase: Phase) -> None:
    expected = {Phase.SUCCEEDED: "Current", Phase.FAILED: "Failed"}.get(phase, "InProgress")
    assert kstatus(1, to_wire(status_in(phase))) == expected


def test_kstatus_is_in_progress_before_first_write_and_after_spec_change() -> None:
    assert kstatus(1, {"observedGeneration": -1}) == "InProgress"
    assert kstatus(2, to_wire(status_in(Phase.SUCCEEDED))) == "InProgress"
    assert kstatus(2, to_wire(with_observed_generation(status_in(Phase.SUCCEEDED), 2))) == "Current"


@pytest.mark.parametrize("phase", Phase)
def test_conditions(phase: Phase) -> None:
    conditions = {entry.type: entry.status for entry in status_in(phase).conditions}
    finished = phase in TERMINAL
    assert set(conditions) == set(ConditionType)
    assert conditions[ConditionType.FINISHED] == str(finished)
    assert conditions[ConditionType.RECONCILING] == str(not finished)
    assert conditions[ConditionType.STALLED] == str(phase is Phase.FAILED)
    assert conditions[ConditionType.SUSPENDED] == str(phase is Phase.SUSPENDED)
    assert conditions[ConditionType.READY] == str(phase is Phase.SUCCEEDED)
    assert conditions[ConditionType.SUCCEEDED] == (str(phase is Phase.SUCCEEDED) if finished else "Unknown")


@pytest.mark.parametrize("phase", Phase)
def test_status_survives_round_trip(phase: Phase) -> None:
    status = status_in(phase, prepared=make_prepared(), plan=make_plan_status())
    assert QLoRAJobStatus.model_validate(to_wire(status)) == status


def test_transition_time_changes_only_with_condition_status() -> None:
    before = status_in(Phase.PREPARING)
    later = NOW + timedelta(minutes=5)
    after = derive_status(before, Decision(Phase.FAILED, Reason.S3_DENIED, "no"), None, gpus=1, generation=1, now=later)
    times = {entry.type: entry.last_transition_time for entry in after.conditions}
    assert times[ConditionType.READY] == NOW
    assert times[ConditionType.STALLED] == later


def test_same_decision_leaves_status_unchanged() -> None:
    status = status_in(Phase.TRAINING)
    again = derive_status(
        status, Decision(Phase.TRAINING, Reason.TRAINING, "because"), None, gpus=1, generation=1,
        now=NOW + timedelta(hours=1),
    )  # fmt: skip
    assert again == status


def test_facts_are_carried_over() -> None:
    prepared = status_in(Phase.SCHEDULING, prepared=make_prepared(), plan=make_plan_status())
    failed = status_in(Phase.FAILED, previous=prepared)
    facts = {"model", "dataset", "output", "plan", "started_at"}
    assert failed.model_dump(include=facts) == prepared.model_dump(include=facts)


def test_failure_message_has_remedy() -> None:
    assert status_in(Phase.FAILED).message == (
        "because. What to do: Lower spec.training.microBatchSize or spec.training.maxLength, or choose a larger GPU."
    )


@pytest.mark.parametrize("shift", range(5))
def test_messages_are_cut_between_escapes(shift: int) -> None:
    text = "x" * shift + "\x1b" * MAX_MESSAGE
    attempt = Attempt(number=1, job="support-bot-1", reason=Reason.TRAINER_ERROR).model_copy(update={"message": text})
    decision = Decision(Phase.FAILED, Reason.TRAINER_ERROR, text, attempt=attempt)
    status = derive_status(QLoRAJobStatus(), decision, None, gpus=1, generation=1, now=NOW)
    assert (status.message or "").partition(". What to do: ")[0].endswith("\\x1b")
    assert status.attempts[0].message.endswith("\\x1b")
    assert len(status.message or "") <= MAX_MESSAGE
    assert len(status.attempts[0].message) <= MAX_ATTEMPT_MESSAGE


def test_result_is_in_status() -> None:
    status = status_in(Phase.SUCCEEDED, prepared=make_prepared(published=make_result()), result=make_result())
    assert status.evaluation == make_result().evaluation
    assert status.output is not None
    assert status.output.adapter == make_result().adapter
    assert (status.progress, status.eta) == ("100%", None)


def test_attempt_start_is_kept_once_known() -> None:
    running = status_in(Phase.TRAINING, attempt=Attempt(number=1, job="a-1", started_at=NOW))
    ended = status_in(Phase.FAILED, running, attempt=Attempt(number=1, job="a-1", reason=Reason.S3_DENIED))
    assert [(attempt.started_at, attempt.reason) for attempt in ended.attempts] == [(NOW, Reason.S3_DENIED)]


@pytest.mark.parametrize("phase", sorted(TERMINAL))
def test_finished_run_holds_no_gpu(phase: Phase) -> None:
    assert status_in(phase).gpus == 0
    former = QLoRAJobStatus(phase=phase, gpus=2)
    assert with_observed_generation(former, 1).gpus == 0, "of an operator that counted what had been requested"


@pytest.mark.parametrize("phase", [phase for phase in Phase if phase not in RUNNING])
def test_run_without_running_pod_has_no_eta(phase: Phase) -> None:
    live = Progress(percent=42, remaining_seconds=190, updated_at=NOW)
    status = derive_status(QLoRAJobStatus(), Decision(phase, REASONS[phase], ""), live, gpus=0, generation=1, now=NOW)
    assert (status.eta, status.last_report) == (None, live)


def test_summary_is_beginning_of_message_without_remedy() -> None:
    assert status_in(Phase.FAILED).summary == "because"
    decision = Decision(Phase.FAILED, Reason.S3_DENIED, "x\ny" * 100)
    summary = derive_status(QLoRAJobStatus(), decision, None, gpus=0, generation=1, now=NOW).summary
    assert summary is not None
    assert (len(summary), summary[-1], "\n" in summary) == (MAX_SUMMARY, "…", False)


def test_report_fills_columns() -> None:
    live = Progress(percent=42, step=120, remaining_seconds=190, loss=2.83123, tokens_per_second=812.4, updated_at=NOW)
    decision = Decision(Phase.TRAINING, Reason.TRAINING, "", plan=make_plan_status())
    status = derive_status(QLoRAJobStatus(), decision, live, gpus=0, generation=1, now=NOW)
    assert (status.progress, status.eta, status.loss, status.step, status.tokens_per_second) == (
        "42%", "3m10s", "2.831", "120/180", "812",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59, "59s"), (60, "1m00s"), (190, "3m10s"), (3600, "1h00m"), (7500, "2h05m"), (93_600, "1d02h")],
)
def test_eta(seconds: int, text: str) -> None:
    assert format_duration(seconds) == text


def test_numbers_fit_their_columns() -> None:
    assert (format_number(2.8312, 3), format_number(1e300, 3)) == ("2.831", "1.00e+300")
    assert (format_step(None, 3), format_step(2, None), format_step(2, 3)) == (None, "2", "2/3")
