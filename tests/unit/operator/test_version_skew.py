"""CRD, operator and trainer of neighboring versions: a run under way goes on, and what others wrote is not lost."""

import copy
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any, Final

import pytest

from qlora_api import __version__, names, tolerant_reader
from qlora_api.names import Phase
from qlora_api.reasons import Reason
from qlora_api.v1alpha1 import QLoRAJobSpec
from qlora_operator.cluster.interface import AdmissionDeniedError
from qlora_operator.controller.children import ADMISSION_DENIED_RETRY
from qlora_operator.models import Manifest
from qlora_operator.stored_job import keep_unknown, read_job
from qlora_planner import validation
from tests.fakes import FakeCluster
from tests.make import (
    INSTALLATION,
    PREPARED_MESSAGE,
    PUBLISHED_MESSAGE,
    REF,
    make_manifest,
    make_prepared,
    make_result,
    make_spec_manifest,
    make_termination_message,
)
from tests.unit.operator import life
from tests.unit.operator.life import PREPARE, TRAIN, reconcile_now, reconcile_until_stable

UNKNOWN: Final = "fieldOfTomorrow"
SECOND: Final = names.train_job_name("support-bot", 2)


async def start_preparing(**change: Any) -> FakeCluster:
    cluster = FakeCluster()
    cluster.submit(make_manifest(**change))
    await reconcile_until_stable(cluster)
    return cluster


async def start_queued() -> FakeCluster:
    cluster = await start_preparing(queue={"name": "research"})
    cluster.end_pod(PREPARE, 0, PREPARED_MESSAGE)
    await reconcile_until_stable(cluster)
    return cluster


async def start_training() -> FakeCluster:
    cluster = await start_preparing()
    cluster.end_pod(PREPARE, 0, PREPARED_MESSAGE)
    await reconcile_until_stable(cluster)
    cluster.start_pod(TRAIN)
    await reconcile_until_stable(cluster)
    return cluster


async def start_second_attempt() -> FakeCluster:
    cluster = await start_training()
    cluster.end_pod(TRAIN, 1, make_termination_message(Reason.INTERRUPTED))
    await reconcile_until_stable(cluster)
    cluster.start_pod(SECOND)
    await reconcile_until_stable(cluster)
    return cluster


async def start_suspended() -> FakeCluster:
    cluster = await start_training()
    cluster.change(suspend=True)
    await reconcile_until_stable(cluster)
    cluster.remove(TRAIN)
    await reconcile_until_stable(cluster)
    return cluster


STAGES: Final = (start_preparing, start_queued, start_training, start_second_attempt, start_suspended)


def with_unknown_fields(value: Any) -> Any:
    """Add a field to every object of a document, as a newer version may."""
    if isinstance(value, dict) and value:  # an empty one is a mapping, such as nodeSelector
        return {**{key: with_unknown_fields(item) for key, item in value.items()}, UNKNOWN: {"enabled": True}}
    return [with_unknown_fields(item) for item in value] if isinstance(value, list) else value


def edit(cluster: FakeCluster, block: str, change: Callable[[Any], Any]) -> None:
    """Change what is stored, as another CRD or another operator does, without a new generation."""
    assert cluster.job
    cluster.job[block] = change(copy.deepcopy(cluster.job[block]))
    cluster.job["metadata"]["resourceVersion"] = f"{cluster.job['metadata']['resourceVersion']}0"


def state(cluster: FakeCluster) -> tuple[Any, ...]:
    """What a user sees of a run, and its Jobs by uid."""
    jobs = {name: job["metadata"]["uid"] for (kind, name), job in cluster.children.items() if kind == "Job"}
    deleted = [name for verb, name in cluster.writes if verb == "delete"]
    return cluster.status["phase"], cluster.status["reason"], jobs, deleted


def full_spec(spec: Manifest) -> Manifest:
    """Return the spec with every default, as the API server stores it, so that every block is there."""
    return QLoRAJobSpec.model_validate(spec).model_dump(mode="json", by_alias=True, exclude_none=True)


def set_in(document: Any, path: str, value: Any) -> Any:
    *parents, last = path.split(".")
    block = document
    for key in parents:
        block = block[int(key)] if isinstance(block, list) else block.setdefault(key, {})
    block[last] = value
    return document


@pytest.mark.parametrize("start", STAGES)
async def test_run_under_newer_crd_continues(start: Callable[[], Any]) -> None:
    cluster = await start()
    before = state(cluster)
    edit(cluster, "spec", lambda spec: with_unknown_fields(full_spec(spec)))
    edit(cluster, "status", with_unknown_fields)
    await reconcile_until_stable(cluster)
    assert state(cluster) == before


async def test_plan_says_which_fields_of_a_newer_crd_were_ignored() -> None:
    cluster = await start_preparing()
    edit(cluster, "spec", lambda spec: {**full_spec(spec), UNKNOWN: 1})
    cluster.end_pod(PREPARE, 0, PREPARED_MESSAGE)
    await reconcile_until_stable(cluster)
    expected = f"ignored, because operator {__version__} does not know it: spec fields {UNKNOWN}"
    assert cluster.status["plan"]["reasons"][-1] == expected


@pytest.mark.parametrize("start", STAGES[1:])
async def test_run_under_stricter_rules_continues(start: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = await start()
    before = state(cluster)
    monkeypatch.setattr(validation, "CLUSTER_RULES", (lambda _: "spec.model is not to be trained any more",))
    monkeypatch.setattr(validation.check, "__defaults__", (validation.CLUSTER_RULES,))
    await reconcile_until_stable(cluster)
    assert state(cluster) == before


async def test_spec_of_new_run_is_judged_by_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation.check, "__defaults__", ((lambda _: "spec.model is not to be trained any more",),))
    cluster = await start_preparing()
    assert (cluster.status["phase"], cluster.status["reason"]) == ("Failed", "InvalidSpec")


STRICTER: Final = [
    pytest.param("model.uri", "hf://gpt2", id="pattern of the model"),
    pytest.param("output.uri", "s3://my_bucket/out", id="pattern of the output"),
    pytest.param("retries.maxAttempts", 500, id="bound"),
    pytest.param("training.epochs", 10**9, id="another bound"),
    pytest.param("resources.gpuProduct", "x" * 300, id="length"),
]


@pytest.mark.parametrize(("path", "value"), STRICTER)
async def test_run_with_value_refused_today_trains_to_its_end(path: str, value: Any) -> None:
    cluster = await start_training()
    before = state(cluster)
    if path.endswith("uri"):
        replace_everywhere(cluster, make_spec_manifest()[path.partition(".")[0]]["uri"], value)
    edit(cluster, "spec", lambda spec: set_in(spec, path, value))
    await reconcile_until_stable(cluster)
    assert state(cluster) == before
    cluster.end_pod(TRAIN, 1, make_termination_message(Reason.INTERRUPTED))
    await reconcile_until_stable(cluster)
    assert ("Job", SECOND) in cluster.children


def replace_everywhere(cluster: FakeCluster, old: str, new: str) -> None:
    """Replace a text in the QLoRAJob and in the messages of its pods, as if the run had started with it."""
    cluster.job = json.loads(json.dumps(cluster.job).replace(old, new))
    cluster.pods = json.loads(json.dumps(cluster.pods).replace(old, new))


@pytest.mark.parametrize(("path", "value"), STRICTER)
async def test_new_run_with_value_refused_today_is_invalid(path: str, value: Any) -> None:
    cluster = FakeCluster()
    cluster.submit(make_manifest())
    edit(cluster, "spec", lambda spec: set_in(spec, path, value))
    await reconcile_until_stable(cluster)
    assert (cluster.status["phase"], cluster.status["reason"]) == ("Failed", "InvalidSpec")
    assert f"spec.{path}" in cluster.status["message"]


UNREADABLE: Final = [
    pytest.param("spec", "distribution", "zero4", id="strategy"),
    pytest.param("spec", "method", "dpo", id="method"),
    pytest.param("spec", "quantization.bits", "two", id="type"),
    pytest.param("spec", "deadlines.total", "2w", id="duration"),
    pytest.param("spec", "output", {"registry": "oci://registry.example/adapters"}, id="required field is gone"),
    pytest.param("status", "plan.strategy", "zero4", id="strategy of the plan"),
    pytest.param("status", "plan.device", "abacus", id="device of the plan"),
    pytest.param("status", "attempts.0.number", "first", id="number of an attempt"),
]


@pytest.mark.parametrize(("block", "path", "value"), UNREADABLE)
async def test_unreadable_run_is_left_alone_until_the_newer_operator_comes(block: str, path: str, value: Any) -> None:
    cluster = await start_training()
    before, good = state(cluster), copy.deepcopy(cluster.job)
    edit(cluster, block, lambda document: set_in(document, path, value))
    await reconcile_until_stable(cluster)
    assert state(cluster) == before
    cluster.end_pod(TRAIN, 1, make_termination_message(Reason.INTERRUPTED))
    await reconcile_until_stable(cluster)
    assert ("Job", SECOND) not in cluster.children
    assert cluster.status["phase"] == "Training"
    assert f"{block}.{path.partition('.')[0]}" in cluster.status["message"]
    assert good
    assert cluster.job
    edit(cluster, block, lambda _: good[block])
    await reconcile_until_stable(cluster)
    assert ("Job", SECOND) in cluster.children


@pytest.mark.parametrize(("block", "path", "value"), UNREADABLE)
async def test_unreadable_run_between_attempts_is_not_planned_again(block: str, path: str, value: Any) -> None:
    cluster = await start_training()
    cluster.end_pod(TRAIN, 1, make_termination_message(Reason.INTERRUPTED))
    await reconcile_now(cluster)
    assert cluster.status["phase"] == "Scheduling"
    edit(cluster, block, lambda document: set_in(document, path, value))
    plan, attempts = cluster.status["plan"], cluster.status["attempts"]
    await reconcile_until_stable(cluster)
    assert (cluster.status["phase"], cluster.status["plan"]) == ("Scheduling", plan)
    assert cluster.status["attempts"] == attempts
    assert ("Job", SECOND) not in cluster.children


async def test_unreadable_run_is_suspended_and_released() -> None:
    cluster = await start_training()
    edit(cluster, "spec", lambda spec: set_in(spec, "distribution", "zero4"))
    cluster.change(suspend=True)
    await reconcile_until_stable(cluster)
    assert cluster.status["phase"] == "Suspended"
    assert ("delete", TRAIN) in cluster.writes


async def test_unreadable_run_that_publishes_succeeds() -> None:
    cluster = await start_training()
    edit(cluster, "spec", lambda spec: set_in(spec, "distribution", "zero4"))
    cluster.end_pod(TRAIN, 0, PUBLISHED_MESSAGE)
    await reconcile_until_stable(cluster)
    assert cluster.status["phase"] == "Succeeded"


async def test_new_run_with_word_of_newer_crd_waits() -> None:
    cluster = FakeCluster()
    cluster.submit(make_manifest())
    edit(cluster, "spec", lambda spec: set_in(spec, "distribution", "zero4"))
    await reconcile_until_stable(cluster)
    assert (cluster.status["phase"], cluster.status["reason"]) == ("Pending", "Accepted")
    assert cluster.status["message"].startswith("spec.distribution: written by another version")
    assert not cluster.children
    edit(cluster, "spec", lambda spec: {key: value for key, value in spec.items() if key != "distribution"})
    await reconcile_until_stable(cluster)
    assert cluster.status["phase"] == "Preparing"


@pytest.mark.parametrize("start", STAGES)
async def test_words_of_newer_status_are_understood_as_far_as_possible(start: Callable[[], Any]) -> None:
    cluster = await start()
    before = state(cluster)
    edit(cluster, "status", lambda status: {**status, "phase": "Rehearsing", "reason": "RehearsedAtNight"})
    await reconcile_until_stable(cluster)
    assert state(cluster) == before


@pytest.mark.parametrize(
    ("succeeded", "expected"), [("True", Phase.SUCCEEDED), ("False", Phase.FAILED)], ids=["succeeded", "failed"]
)
async def test_run_over_in_unknown_phase_stays_over(succeeded: str, expected: Phase) -> None:
    cluster = await start_training()
    conditions = [
        {**entry, "status": {"Finished": "True", "Succeeded": succeeded}.get(entry["type"], entry["status"])}
        for entry in cluster.status["conditions"]
    ]
    edit(cluster, "status", lambda status: {**status, "phase": "Archived", "conditions": conditions})
    assert cluster.job
    outcome = await reconcile_now(cluster)
    assert outcome.status
    assert outcome.status.phase is expected
    assert cluster.status["phase"] == "Archived"
    assert ("Job", SECOND) not in cluster.children


async def test_attempt_that_ended_with_unknown_reason_counts_as_ended() -> None:
    cluster = await start_second_attempt()
    before = state(cluster)
    edit(cluster, "status", lambda status: set_in(status, "attempts.0.reason", "SolarFlare"))
    await reconcile_until_stable(cluster)
    assert state(cluster) == before
    assert cluster.status["attempts"][0]["reason"] == "SolarFlare"
    cluster.end_pod(SECOND, 1, make_termination_message(Reason.INTERRUPTED))
    await reconcile_until_stable(cluster)
    cluster.pass_time(timedelta(minutes=1))
    await reconcile_until_stable(cluster)
    assert [entry["reason"] for entry in cluster.status["attempts"][:2]] == ["SolarFlare", "Interrupted"]
    assert ("Job", names.train_job_name("support-bot", 3)) in cluster.children


async def test_status_write_keeps_what_another_version_stored() -> None:
    cluster = await start_training()
    condition = {"type": "Accounted", "status": "True", "reason": "GpuSeconds", "message": "", "observedGeneration": 1}
    edit(
        cluster,
        "status",
        lambda status: {
            **with_unknown_fields(status),
            "conditions": [*status["conditions"], condition],
            "lastReport": "a text",
        },
    )
    cluster.end_pod(TRAIN, 1, make_termination_message(Reason.INTERRUPTED))
    await reconcile_until_stable(cluster)
    assert cluster.status["attempts"][0]["reason"] == "Interrupted"
    assert cluster.status[UNKNOWN] == {"enabled": True}
    assert cluster.status["plan"][UNKNOWN] == {"enabled": True}
    assert cluster.status["attempts"][0][UNKNOWN] == {"enabled": True}
    assert cluster.status["lastReport"] == "a text"
    assert condition in cluster.status["conditions"]


def test_keep_unknown_removes_what_is_removed_on_purpose() -> None:
    stored = {"checkpoint": {"step": 3}, "new": 1, "phase": "Training", "attempts": [{"number": 1, "new": 2}]}
    before = {"checkpoint": {"step": 3}, "phase": "Training", "attempts": [{"number": 1}]}
    after = {"phase": "Succeeded", "attempts": [{"number": 1, "reason": "Published"}, {"number": 2}]}
    assert keep_unknown(stored, before, after) == {
        "new": 1,
        "phase": "Succeeded",
        "attempts": [{"number": 1, "new": 2, "reason": "Published"}, {"number": 2}],
    }


async def test_new_reason_under_older_crd_ends_a_run_without_a_loop() -> None:
    cluster = await start_training()

    def refuse(status: Manifest) -> str | None:
        if '"GateFailed"' not in json.dumps(status):
            return None
        return '422 Invalid: status.reason: Unsupported value: "GateFailed": supported values: "Accepted", "Queued"'

    cluster.invalid_status = refuse
    cluster.end_pod(TRAIN, 1, make_termination_message(Reason.GATE_FAILED, "loss is 3.1"))
    await reconcile_until_stable(cluster)
    assert (cluster.status["phase"], cluster.status["reason"]) == ("Failed", "TrainerError")
    assert cluster.status["message"].startswith("GateFailed: loss is 3.1")
    assert cluster.status["attempts"][0]["reason"] == "TrainerError"
    assert cluster.condition("Stalled") == "True"


async def test_new_reason_of_waiting_run_under_older_crd_does_not_stop_it() -> None:
    cluster = await start_preparing(queue={"name": "research"})
    cluster.invalid_status = lambda status: (
        'status.reason: Unsupported value: "Queued"' if '"reason": "Queued"' in json.dumps(status) else None
    )
    cluster.end_pod(PREPARE, 0, PREPARED_MESSAGE)
    for _ in range(5):
        await reconcile_now(cluster)
    version = cluster.job and cluster.job["metadata"]["resourceVersion"]
    assert await reconcile_now(cluster) == await reconcile_now(cluster)
    assert (cluster.status["phase"], cluster.status["reason"]) == ("Queued", "Accepted")
    assert cluster.job
    assert cluster.job["metadata"]["resourceVersion"] == version


async def test_unknown_fields_under_older_crd_are_given_up() -> None:
    cluster = await start_training()
    edit(cluster, "status", lambda status: set_in(status, "attempts.0.reason", None) | {UNKNOWN: 1})
    cluster.invalid_status = lambda status: "unknown field" if UNKNOWN in status else None
    cluster.end_pod(TRAIN, 0, PUBLISHED_MESSAGE)
    await reconcile_until_stable(cluster)
    assert cluster.status["phase"] == "Succeeded"
    assert UNKNOWN not in cluster.status


def changed_message(message: str, **change: Any) -> str:
    return json.dumps({**with_unknown_fields(json.loads(message)), **change})


async def test_messages_of_newer_trainer_are_read() -> None:
    cluster = await start_preparing()
    cluster.end_pod(PREPARE, 0, changed_message(PREPARED_MESSAGE))
    await reconcile_until_stable(cluster)
    cluster.start_pod(TRAIN)
    cluster.end_pod(TRAIN, 0, changed_message(PUBLISHED_MESSAGE))
    await reconcile_until_stable(cluster)
    assert cluster.status["phase"] == "Succeeded"


async def test_unknown_reasons_of_newer_trainer_are_read_by_their_facts() -> None:
    cluster = await start_preparing()
    cluster.end_pod(PREPARE, 0, changed_message(PREPARED_MESSAGE, reason="PreparedWithCare"))
    await reconcile_until_stable(cluster)
    cluster.start_pod(TRAIN)
    cluster.end_pod(TRAIN, 0, changed_message(PUBLISHED_MESSAGE, reason="PublishedWithPride"))
    await reconcile_until_stable(cluster)
    assert (cluster.status["phase"], cluster.status["reason"]) == ("Succeeded", "Published")


async def test_unknown_reason_of_preparation_that_found_a_result_succeeds() -> None:
    cluster = await start_preparing()
    message = make_termination_message(Reason.ALREADY_PUBLISHED, prepared=make_prepared(published=make_result()))
    cluster.end_pod(PREPARE, 0, changed_message(message, reason="FoundInTheAttic"))
    await reconcile_until_stable(cluster)
    assert (cluster.status["phase"], cluster.status["reason"]) == ("Succeeded", "AlreadyPublished")


async def test_unknown_failure_of_newer_trainer_is_named() -> None:
    cluster = await start_training()
    message = make_termination_message(Reason.GATE_FAILED, "too many toks")
    cluster.end_pod(TRAIN, 1, changed_message(message, reason="Overcooked"))
    await reconcile_until_stable(cluster)
    assert "ended with 'Overcooked': too many toks" in cluster.status["attempts"][0]["message"]
    assert cluster.status["attempts"][0]["reason"] == "TrainerError"


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"result": {"adapter": "s3://attacker/x"}}, id="foreign and incomplete"),
        pytest.param({"step": "many"}, id="wrong type"),
        pytest.param({"result": make_result().model_dump(mode="json", by_alias=True) | {"steps": 2**60}}, id="number"),
    ],
)
async def test_known_fields_of_newer_message_stay_validated(change: dict[str, Any]) -> None:
    cluster = await start_training()
    cluster.end_pod(TRAIN, 0, changed_message(PUBLISHED_MESSAGE, reason="PublishedWithPride", **change))
    await reconcile_until_stable(cluster)
    assert cluster.status["attempts"][0]["reason"] == "TrainerError"
    assert "adapter" not in cluster.status["output"]


async def test_foreign_result_under_unknown_reason_is_refused() -> None:
    cluster = await start_training()
    message = PUBLISHED_MESSAGE.replace("s3://adapters/team-a", "s3://attacker")
    cluster.end_pod(TRAIN, 0, changed_message(message, reason="PublishedWithPride"))
    await reconcile_until_stable(cluster)
    assert cluster.status["phase"] == "Failed"
    assert "not of this run" in cluster.status["message"]


async def test_unknown_fields_are_logged_once_for_all_objects(caplog: pytest.LogCaptureFixture) -> None:
    tolerant_reader._logged.clear()
    cluster = await start_training()
    edit(cluster, "spec", lambda spec: {**spec, UNKNOWN: 1})
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            await reconcile_now(cluster)
    assert [record.getMessage() for record in caplog.records if UNKNOWN in record.getMessage()] == [
        "spec of ml/support-bot: fields that this version does not know are ignored, here and in others alike: "
        + UNKNOWN
    ]


async def test_status_without_optional_fields_is_read() -> None:
    cluster = await start_training()
    before = state(cluster)
    edit(cluster, "status", _only_required)
    await reconcile_until_stable(cluster)
    assert state(cluster) == before


def _only_required(status: Manifest) -> Manifest:
    attempts = [{"number": entry["number"], "job": entry["job"]} for entry in status["attempts"]]
    return {key: status[key] for key in ("phase", "reason", "plan", "output")} | {"attempts": attempts}


async def test_reading_never_raises_on_hostile_shapes() -> None:
    cluster = await start_training()
    assert cluster.job
    raw = await cluster.read_job(REF)
    assert raw
    value: Any
    for value in (None, 7, "text", [], [[]], {"": None}, [{"number": None}], True):
        for key in (*raw.status, "unknown"):
            read_job(replace(raw, status={**raw.status, key: value}))
        for key in (*raw.spec, "unknown"):
            read_job(replace(raw, spec={**raw.spec, key: value}))


@pytest.mark.parametrize("refusal", ["invalid", "taken"])
async def test_run_with_attempts_waits_where_a_new_one_would_be_invalid(refusal: str) -> None:
    cluster = await start_training()
    cluster.end_pod(TRAIN, 1, make_termination_message(Reason.INTERRUPTED))
    if refusal == "invalid":
        cluster.admission_error = AdmissionDeniedError("Job was denied: 422 Invalid", permanent=True)
    else:
        cluster.children["Job", SECOND] = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": SECOND}}
    for _ in range(5):
        outcome = await reconcile_now(cluster)
    assert cluster.status["reason"] == "PodRejected"
    assert outcome.requeue_after == ADMISSION_DENIED_RETRY
    cluster.admission_error = None
    cluster.children.pop(("Job", SECOND), None)
    await reconcile_until_stable(cluster)
    assert cluster.status["attempts"][-1]["job"] == SECOND
    assert cluster.status["phase"] == "Scheduling"


NEW_IMAGE: Final = "registry.example/trainer:2"


def image_of(cluster: FakeCluster, job: str) -> str:
    return str(cluster.children["Job", job]["spec"]["template"]["spec"]["containers"][0]["image"])


async def test_run_keeps_the_image_that_prepared_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = await start_preparing()
    first = image_of(cluster, PREPARE)
    monkeypatch.setattr(life, "INSTALLATION", replace(INSTALLATION, image=NEW_IMAGE))
    cluster.end_pod(PREPARE, 0, PREPARED_MESSAGE)
    await reconcile_until_stable(cluster)
    assert (cluster.status["plan"]["image"], image_of(cluster, TRAIN)) == (first, first)
    cluster.start_pod(TRAIN)
    cluster.end_pod(TRAIN, 1, make_termination_message(Reason.CUDA_OUT_OF_MEMORY))
    await reconcile_until_stable(cluster)
    assert image_of(cluster, SECOND) == first
    cluster.remove(SECOND)
    cluster.remove(PREPARE)
    await reconcile_until_stable(cluster)
    assert cluster.status["phase"] == "Preparing"
    assert image_of(cluster, names.prepare_job_name("support-bot", 2)) == first


async def test_image_of_a_run_is_pulled_with_its_own_secrets_and_those_of_the_installation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(life, "INSTALLATION", replace(INSTALLATION, pull_secrets=("old", "both")))
    cluster = await start_preparing()
    upgraded = replace(INSTALLATION, image=NEW_IMAGE, pull_secrets=("both", "new"))
    monkeypatch.setattr(life, "INSTALLATION", upgraded)
    cluster.end_pod(PREPARE, 0, PREPARED_MESSAGE)
    await reconcile_until_stable(cluster)
    pod = cluster.children["Job", TRAIN]["spec"]["template"]["spec"]
    assert [secret["name"] for secret in pod["imagePullSecrets"]] == ["both", "new", "old"]


async def test_new_run_has_the_image_of_the_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(life, "INSTALLATION", replace(INSTALLATION, image=NEW_IMAGE))
    assert image_of(await start_training(), TRAIN) == NEW_IMAGE


async def test_plan_of_earlier_version_has_the_image_of_the_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = await start_training()
    edit(cluster, "status", lambda status: {**status, "plan": {**status["plan"], "image": None}})
    monkeypatch.setattr(life, "INSTALLATION", replace(INSTALLATION, image=NEW_IMAGE))
    cluster.end_pod(TRAIN, 1, make_termination_message(Reason.INTERRUPTED))
    await reconcile_until_stable(cluster)
    assert image_of(cluster, SECOND) == NEW_IMAGE


async def test_retry_keeps_the_image_that_prepared_it_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = await start_training()
    cluster.end_pod(TRAIN, 1, make_termination_message(Reason.MODEL_NOT_FOUND))
    await reconcile_until_stable(cluster)
    assert cluster.status["phase"] == "Failed"
    monkeypatch.setattr(life, "INSTALLATION", replace(INSTALLATION, image=NEW_IMAGE))
    cluster.annotate(names.RETRY_ANNOTATION, "1")
    await reconcile_until_stable(cluster)
    cluster.end_pod(names.prepare_job_name("support-bot", 2), 0, PREPARED_MESSAGE)
    await reconcile_until_stable(cluster)
    assert (cluster.status["plan"]["image"], image_of(cluster, SECOND)) == (NEW_IMAGE, NEW_IMAGE)
    monkeypatch.setattr(life, "INSTALLATION", replace(INSTALLATION, image="registry.example/trainer:3"))
    cluster.end_pod(SECOND, 1, make_termination_message(Reason.INTERRUPTED))
    await reconcile_until_stable(cluster)
    assert image_of(cluster, names.train_job_name("support-bot", 3)) == NEW_IMAGE
