"""Documents of older and newer versions, as pods, buckets and the API server have them."""

import json
import logging
from pathlib import Path
from typing import Any, Final

import pytest
from pydantic import BaseModel, ValidationError

from qlora_api import tolerant_reader
from qlora_api.prepared import PinnedTask, PinnedTasks, Prepared, PreparedInputs
from qlora_api.reasons import Reason
from qlora_api.report import AdapterRecord, ManifestFile, ResultManifest, TerminationMessage
from qlora_api.result import Result
from qlora_api.runconfig import PrepareConfig, RunConfig
from qlora_api.tolerant_reader import ignore_unknown, read_stored
from qlora_api.v1alpha1 import Attempt, Checkpoint, QLoRAJobSpec, QLoRAJobStatus, QuantizationSpec
from tests.make import NOW, make_plan_status, make_prepared, make_result, make_spec

FIRST: Final = Path(__file__).parent / "wire"
"""Configuration as the first version of the operator wrote it."""
DIGEST: Final = "c" * 64
UNKNOWN: Final = "fieldOfTomorrow"
CHECKPOINT: Final = Checkpoint(step=3, uri="s3://adapters/x", time=NOW)
DOCUMENTS: Final[tuple[BaseModel, ...]] = (
    RunConfig(
        namespace="ml", job="bot", attempt=1, spec=make_spec(), plan=make_plan_status(), prepared=make_prepared()
    ),
    PrepareConfig(namespace="ml", job="bot", spec=make_spec()),
    TerminationMessage(reason=Reason.PREPARED, prepared=make_prepared(published=make_result()), checkpoint=CHECKPOINT),
    make_prepared(),
    make_result(),
    PreparedInputs(prepared={"rows": DIGEST}, model={"config.json": DIGEST}, weights={"model.safetensors": "etag"}),
    PinnedTasks(tasks=(PinnedTask(name="arc", file="arc/easy.yaml", dataset="allenai/ai2_arc", commit="d" * 40),)),
    ResultManifest(
        digest="0123456789abcdef",
        job="bot",
        namespace="ml",
        base_model="hf://a/b",
        base_commit="d" * 40,
        dataset_uri="s3://data/rows.jsonl",
        dataset_digest=DIGEST,
        trainer_version="0.1.0",
        created_at=NOW,
        result=make_result(),
        files=(ManifestFile(path="adapter/adapter_model.safetensors", size=1, sha256=DIGEST),),
    ),
    AdapterRecord(
        job="bot",
        digest="0123456789abcdef",
        base="hf://a/b",
        commit="d" * 40,
        method="qlora",
        quantization=QuantizationSpec(),
        dtype="float32",
        attention="sdpa",
        format="chat",
    ),
)


def wire(document: BaseModel, **options: Any) -> dict[str, Any]:
    return document.model_dump(mode="json", by_alias=True, exclude_none=True, **options)


def with_unknown_fields(value: Any, kind: object) -> Any:
    """Add a field to every object whose names are those of a model; a mapping with free keys is left alone."""
    if isinstance(kind, BaseModel):
        fields = {field.alias or name: getattr(kind, name) for name, field in type(kind).model_fields.items()}
        return {**{key: with_unknown_fields(item, fields[key]) for key, item in value.items()}, UNKNOWN: [{"a": None}]}
    if isinstance(kind, tuple):
        return [with_unknown_fields(item, part) for item, part in zip(value, kind, strict=True)]
    return value


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: type(document).__name__)
def test_document_of_newer_version_reads_as_this_version(document: BaseModel) -> None:
    newer = json.dumps(with_unknown_fields(wire(document), document))
    with pytest.raises(ValidationError, match="Extra inputs"):
        type(document).model_validate_json(newer)
    assert ignore_unknown(type(document), newer, "test") == document


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: type(document).__name__)
def test_document_of_older_version_without_optional_fields_reads(document: BaseModel) -> None:
    assert ignore_unknown(type(document), wire(document, exclude_defaults=True), "test") == document


@pytest.mark.parametrize(("name", "model"), [("first-run.json", RunConfig), ("first-prepare.json", PrepareConfig)])
def test_configuration_of_the_first_version_reads(name: str, model: type[RunConfig | PrepareConfig]) -> None:
    config = ignore_unknown(model, (FIRST / name).read_bytes(), name)
    assert (config.job, config.spec.training.seed, config.spec.lora.rank) == ("support-bot", 42, 16)


@pytest.mark.parametrize(
    ("document", "change"),
    [
        pytest.param(make_prepared(), {"digest": "../../etc"}, id="digest"),
        pytest.param(make_prepared(), {"model": {"commit": "main"}}, id="nested"),
        pytest.param(make_result(), {"steps": 2**60}, id="integer"),
        pytest.param(make_result(), {"tokensPerSecond": "fast"}, id="type"),
        pytest.param(DOCUMENTS[7], {"files": [{"path": "../x", "size": 1, "sha256": DIGEST}]}, id="path"),
        pytest.param(DOCUMENTS[8], {"attention": "kernels-community/evil"}, id="code"),
    ],
)
def test_known_field_stays_validated_beside_unknown_ones(document: Prepared | Result, change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ignore_unknown(type(document), {**wire(document), **change, UNKNOWN: 1}, "test")


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    tolerant_reader._logged.clear()
    caplog.set_level(logging.WARNING)
    return caplog


def test_unknown_fields_log_is_bounded(log: pytest.LogCaptureFixture) -> None:
    hostile = {**wire(make_result()), **{f"field{number}\n\x1b[31m{'x' * 500}": 1 for number in range(900)}}
    ignore_unknown(Result, hostile, "result")
    ignore_unknown(Result, hostile, "result")
    [record] = log.records
    assert len(record.getMessage()) < 600
    assert "\n" not in record.getMessage()
    ignore_unknown(Result, {**hostile, **{f"more{number}": 1 for number in range(200)}}, "result")
    assert log.records[-1].getMessage().endswith("alike: more than 1000")


def test_unknown_fields_of_many_kinds_are_forgotten_in_order(log: pytest.LogCaptureFixture) -> None:
    for number in range(1000):
        ignore_unknown(Result, {**wire(make_result()), f"field{number}": 1}, "result")
    assert len(log.records) == 1000
    assert len(tolerant_reader._logged) == 256


def test_ten_thousand_objects_with_unknown_field_are_one_line(log: pytest.LogCaptureFixture) -> None:
    attempts = [{"number": number, "job": f"bot-{number}", UNKNOWN: 1} for number in range(1, 90)]
    for number in range(100):
        read_stored(QLoRAJobStatus, {"attempts": attempts}, f"status of ml/bot-{number}")
    assert [record.getMessage() for record in log.records] == [
        f"status of ml/bot-0: fields that this version does not know are ignored, here and in others alike: "
        f"attempts.*.{UNKNOWN}"
    ]


def test_stored_status_without_its_unreadable_parts() -> None:
    stored = {
        "phase": "Training",
        "gpus": "all of them",
        "attempts": [{"number": 1, "job": "bot-1"}, {"number": "two", "job": "bot-2"}, {"number": 3, "job": "bot-3"}],
        "plan": {**wire(make_plan_status()), "peakBytes": "huge"},
        "model": "hf://a/b",
    }
    read = read_stored(QLoRAJobStatus, stored, "status")
    assert read.value
    assert read.value.plan == make_plan_status()
    assert read.value.attempts == (Attempt(number=1, job="bot-1"), Attempt(number=3, job="bot-3"))
    assert read.value == QLoRAJobStatus(phase=read.value.phase, attempts=read.value.attempts, plan=read.value.plan)
    assert read.unreadable == ("gpus", "model", "plan.peakBytes", "attempts.1.number", "attempts.1")


def test_stored_spec_keeps_values_beyond_bounds_but_not_texts_it_has_to_parse() -> None:
    spec = wire(make_spec())
    spec["retries"]["maxAttempts"] = 500
    spec["deadlines"]["total"] = "2w"
    read = read_stored(QLoRAJobSpec, spec, "spec")
    assert read.value
    assert (read.value.retries.max_attempts, read.value.deadlines.total) == (500, "24h")
    assert read.unreadable == ("deadlines.total",)


@pytest.mark.parametrize("text", ['"\\ud800"', '"\\uDFFF"', '{"a": ["\\ud83d"]}'])
def test_half_a_character_is_no_json(text: str) -> None:
    document = TerminationMessage(reason=Reason.PREPARED).model_dump(mode="json", by_alias=True) | {"other": 0}
    with pytest.raises(ValidationError, match="Invalid JSON"):
        ignore_unknown(TerminationMessage, json.dumps(document).replace('"other": 0', f'"other": {text}'), "a test")


def test_pair_of_halves_is_a_character() -> None:
    document = '{"reason": "Prepared", "message": "\\ud83d\\ude00"}'
    assert ignore_unknown(TerminationMessage, document, "a test").message == "\U0001f600"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig", "latin-1"])
def test_document_in_another_encoding_is_no_json(encoding: str) -> None:
    with pytest.raises(ValidationError, match="Invalid JSON"):
        ignore_unknown(TerminationMessage, '{"reason": "Prepared", "message": "\u00e4"}'.encode(encoding), "a test")
