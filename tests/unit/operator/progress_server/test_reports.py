"""Reports that a pod chose to break something: what is accepted always fits the CRD."""

import json
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, Final

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from qlora_api.crd import status_schema
from qlora_api.job_ref import JobRef
from qlora_api.names import Phase
from qlora_api.progress import MAX_COUNT, ProgressReport
from qlora_api.v1alpha1 import Checkpoint, Progress, QLoRAJobStatus
from qlora_operator.models import Decision
from qlora_operator.progress_server.reports import ReportStore, read_report
from qlora_operator.status import derive_status, to_wire
from tests.make import NOW, make_plan_status
from tests.unit.operator.status.test_derive import REASONS

VALIDATOR: Final = jsonschema.Draft202012Validator(status_schema())
INT64: Final = 2**63 - 1
TIME: Final = '"lastUpdatedTime": "2026-03-01T12:00:00Z"'


def body(fields: str) -> bytes:
    return f'{{"trainerStatus": {{{TIME}, {fields}}}}}'.encode()


def metric(name: str, value: str) -> bytes:
    return body(f'"metrics": [{json.dumps({"name": name, "value": value})}]')


REFUSED: Final = {
    "nothing": b"",
    "no UTF-8": b"\xff\xfe",
    "deeply nested": b"[" * 60_000,
    "deeply nested in an unknown field": body('"unknown": ' + "[" * 500 + "]" * 500),
    "ETA of 5,000 digits": body('"estimatedRemainingSeconds": ' + "9" * 5_000),
    "ETA of 5,000 digits as text": body('"estimatedRemainingSeconds": "' + "9" * 5_000 + '"'),
    "ETA of 10**30": body(f'"estimatedRemainingSeconds": {10**30}'),
    "ETA with an exponent": body('"estimatedRemainingSeconds": 1e40'),
    "ETA beyond the bound": body(f'"estimatedRemainingSeconds": {MAX_COUNT + 1}'),
    "NaN": body('"progressPercentage": NaN'),
    "Infinity": body('"progressPercentage": Infinity'),
    "infinite exponent": body('"progressPercentage": 1e999'),
    "negative percentage": body('"progressPercentage": -1'),
    "lone surrogate": body(r'"metrics": [{"name": "\ud800", "value": "1"}]'),
    "endless time": b'{"trainerStatus": {"lastUpdatedTime": 1e400}}',
    "65 metrics": body('"metrics": [' + ", ".join(['{"name": "a", "value": "1"}'] * 65) + "]"),
    "metric of 3,000 characters": metric("loss", "1" * 3_000),
}


@pytest.mark.parametrize("report", REFUSED.values(), ids=REFUSED)
def test_broken_report_is_refused(report: bytes) -> None:
    with pytest.raises(ValidationError):
        ProgressReport.model_validate_json(report)


CHECKPOINT: Final = {"step": "1", "uri": "s3://a/b", "time": "2026-03-01T11:59:00Z"}


def checkpoint(**change: str) -> bytes:
    values = CHECKPOINT | change
    metrics = [{"name": f"checkpoint_{name}", "value": value} for name, value in values.items()]
    return body(f'"metrics": {json.dumps(metrics)}')


HARMLESS: Final = {
    "step 1e40": metric("current_step", "1e40"),
    "step of 2,000 digits": metric("current_step", "9" * 2_000),
    "total 1e40": metric("total_steps", "1e40"),
    "step beyond the bound": metric("current_step", str(MAX_COUNT + 1)),
    "loss NaN": metric("loss", "nan"),
    "loss beyond floats": metric("loss", "1e999"),
    "speed -inf": metric("tokens_per_second", "-inf"),
    "phase Failed": metric("phase", "Failed"),
    "checkpoint of step 10**40": checkpoint(step=str(10**40)),
    "checkpoint with an escape sequence": checkpoint(uri="s3://a/\x1b[2J"),
    "checkpoint with a NUL": checkpoint(uri="s3://a/\x00"),
    "checkpoint that reorders text": checkpoint(uri="s3://a/\u202e"),
    "checkpoint at an infinite time": checkpoint(time="1e400"),
    "checkpoint before the first year": checkpoint(time="0001-01-01T00:00:00+23:59"),
    "checkpoint after the last year": checkpoint(time="9999-12-31T23:59:59-23:59"),
}


@pytest.mark.parametrize("report", HARMLESS.values(), ids=HARMLESS)
def test_broken_value_is_left_out(report: bytes) -> None:
    progress = read_report(ProgressReport.model_validate_json(report), NOW)
    assert progress.model_dump(exclude_none=True) == {"percent": 0, "updated_at": NOW}


def test_largest_values_fit_their_columns() -> None:
    largest = body(
        f'"estimatedRemainingSeconds": {MAX_COUNT}, "metrics": ['
        f'{{"name": "current_step", "value": "{MAX_COUNT}"}}, {{"name": "total_steps", "value": "{MAX_COUNT}"}}]'
    )
    status = derive(largest, Phase.TRAINING)
    assert (status["step"], status["eta"]) == (f"{MAX_COUNT}/{MAX_COUNT}", "11574074074d01h")
    assert_accepted(status)


def derive(report: bytes, phase: Phase) -> dict[str, Any]:
    """Return the status that follows from a report."""
    progress = read_report(ProgressReport.model_validate_json(report), NOW)
    decision = Decision(phase, REASONS[phase], "", plan=make_plan_status())
    return to_wire(derive_status(QLoRAJobStatus(), decision, progress, gpus=1, generation=1, now=NOW))


def assert_accepted(status: dict[str, Any]) -> None:
    """Check a status as the API server does: the schema, and integers of 64 bits."""
    VALIDATOR.validate(json.loads(json.dumps(status, allow_nan=False)))
    assert all(abs(number) <= INT64 for number in integers(status))


def integers(value: Any) -> Iterator[int]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from integers(item)
    elif isinstance(value, int):
        yield value


NUMBERS: Final = st.one_of(
    st.integers(), st.integers(0, 2 * MAX_COUNT), st.floats(), st.sampled_from(["1e40", "nan", "-0", "9" * 400, "1_0"])
).map(str)
TEXTS: Final = st.one_of(NUMBERS, st.text(max_size=40), st.sampled_from([*Phase]), st.datetimes().map(str))
NAMES: Final = st.sampled_from(
    ["current_step", "total_steps", "loss", "tokens_per_second", "phase"]
    + [f"checkpoint_{name}" for name in Checkpoint.model_fields]
)
STATUSES: Final = st.fixed_dictionaries(
    {"lastUpdatedTime": st.one_of(st.just("2026-03-01T12:00:00Z"), st.datetimes().map(str))},
    optional={
        "progressPercentage": st.one_of(st.integers(0, 100), st.booleans()),
        "estimatedRemainingSeconds": st.one_of(st.integers(0, MAX_COUNT), st.integers(0, 10**30)),
        "metrics": st.lists(st.fixed_dictionaries({"name": NAMES, "value": TEXTS}), max_size=12),
    },
)


@given(trainer_status=STATUSES, phase=st.sampled_from(Phase))
def test_status_of_any_accepted_report_fits_the_crd(trainer_status: dict[str, Any], phase: Phase) -> None:
    report = json.dumps({"trainerStatus": trainer_status}).encode()
    try:
        status = derive(report, phase)
    except ValidationError:
        return
    assert_accepted(status)


def at(minutes: float) -> Progress:
    return Progress(updated_at=NOW + timedelta(minutes=minutes))


def test_store_lists_other_reporting_runs_of_a_namespace() -> None:
    store, first, second = ReportStore(), JobRef("ml", "a"), JobRef("ml", "b")
    store.put(first, at(0))
    store.put(JobRef("web", "c"), at(0))
    assert store.others(first) == ()
    store.put(second, at(1))
    assert store.others(first) == (NOW + timedelta(minutes=1),)
    store.set_idle(second)
    assert store.others(first) == ()
    store.put(second, at(2))
    assert store.others(first) == (NOW + timedelta(minutes=2),)
    store.forget(second)
    assert store.others(first) == ()


def test_store_notices_that_reports_arrive_again() -> None:
    store = ReportStore()
    for minutes in (0, 4, 8):
        store.put(JobRef("ml", "a"), at(minutes))
    assert (store.resumed_at("ml"), store.resumed_at("web")) == (NOW, None)
    store.put(JobRef("web", "c"), at(60))
    store.put(JobRef("ml", "b"), at(60))
    assert (store.resumed_at("ml"), store.resumed_at("web")) == (NOW + timedelta(hours=1), NOW + timedelta(hours=1))


def test_restarted_store_expects_runs_that_reported_before() -> None:
    store = ReportStore()
    store.expect(JobRef("ml", "a"), NOW)
    assert store.others(JobRef("ml", "b")) == (NOW,)
    store.put(JobRef("ml", "a"), at(1))
    store.expect(JobRef("ml", "a"), NOW)
    assert store.others(JobRef("ml", "b")) == (NOW + timedelta(minutes=1),)
