"""A pod that somebody took over writes any termination message: the status stays writable and has no foreign URI."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import jsonschema
import pytest
import yaml

from qlora_api.names import TERMINATION_MESSAGE_BYTES
from qlora_api.reasons import Reason
from qlora_api.v1alpha1 import Checkpoint, Progress
from tests.fakes import FakeCluster
from tests.make import NOW, PREPARED_MESSAGE, PUBLISHED_MESSAGE, make_manifest, make_prepared, make_result
from tests.unit.operator.life import PREPARE, TRAIN, reconcile_until_stable

CRD: Final = yaml.safe_load(Path("crds/qlorajobs.qlora.dev.yaml").read_text(encoding="utf-8"))
STATUS: Final = CRD["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["status"]
PREFIX: Final = make_prepared().prefix
CHECKPOINT: Final = {"step": 5, "uri": f"{PREFIX}/checkpoints/step-000005-a1", "time": "2026-03-01T12:00:00Z"}
INTERRUPTED: Final = json.dumps({"reason": "S3Denied", "message": "no", "checkpoint": CHECKPOINT})
ALREADY_PUBLISHED: Final = json.dumps(
    json.loads(PREPARED_MESSAGE)
    | {"reason": "AlreadyPublished"}
    | {"prepared": make_prepared(published=make_result()).model_dump(mode="json", by_alias=True)}
)
Change = Callable[[dict[str, Any]], object]


def replaced(path: str, by: object) -> Change:
    """Replace the field at a dotted path."""

    def change(content: dict[str, Any]) -> None:
        *parents, name = path.split(".")
        for parent in parents:
            content = content[parent]
        content[name] = by

    return change


PREPARATION: Final = {
    "prefix-of-another-run": replaced("prepared.prefix", PREFIX.replace("support-bot", "other")),
    "prefix-in-another-bucket": replaced("prepared.prefix", "s3://evil/support-bot/0123456789abcdef"),
    "shell-in-prefix": replaced("prepared.prefix", "$(touch x)"),
    "digest-of-another-prefix": replaced("prepared.digest", "f" * 16),
    "shell-in-commit": replaced("prepared.model.commit", "abc$(touch x)"),
    "branch-as-commit": replaced("prepared.model.commit", "main"),
    "commit-with-line": replaced("prepared.model.commit", "a" * 40 + "\n"),
    "other-model": replaced("prepared.model.uri", "hf://evil/model"),
    "long-architecture": replaced("prepared.model.architecture", "A" * 129),
    "huge-parameters": replaced("prepared.model.parameters", 10**40),
    "negative-rows": replaced("prepared.dataset.trainingRows", -1),
    "huge-rows": replaced("prepared.dataset.trainingRows", 2**62),
    "exponent-as-tokens": replaced("prepared.dataset.trainingTokens", 1e300),
    "config-is-no-json": replaced("prepared.model.config", "{"),
    "config-is-a-list": replaced("prepared.model.config", "[]"),
    "config-is-nested": replaced("prepared.model.config", "[" * 2000),
    "config-has-nan": replaced("prepared.model.config", '{"hidden_size": NaN}'),
    "config-has-huge-numbers": replaced("prepared.model.config", '{"hidden_size": ' + "9" * 400 + "}"),
    "no-details": replaced("prepared", None),
}
PUBLISHED_BEFORE: Final = {
    "adapter-elsewhere": replaced("prepared.published.adapter", "s3://evil/support-bot/0123456789abcdef/adapter"),
    "shell-in-adapter": replaced("prepared.published.adapter", f"{PREFIX}/$(touch${{IFS}}x)"),
    "report-elsewhere": replaced("prepared.published.report", "javascript:alert(1)"),
    "merged-elsewhere": replaced("prepared.published.merged", "hf://evil/model"),
    "result-elsewhere": replaced("result", json.loads(PUBLISHED_MESSAGE)["result"] | {"adapter": "hf://evil/model"}),
}
TRAINING: Final = {
    "adapter-elsewhere": replaced("result.adapter", "s3://evil/support-bot/0123456789abcdef/adapter"),
    "adapter-of-another-digest": replaced("result.adapter", PREFIX.replace("0123", "4567") + "/adapter"),
    "dots-in-adapter": replaced("result.adapter", f"{PREFIX}/../other/adapter"),
    "shell-in-adapter": replaced("result.adapter", f"{PREFIX}/adapter;touch x"),
    "escape-in-adapter": replaced("result.adapter", f"{PREFIX}/\x1b]52;c;x"),
    "invisible-in-adapter": replaced("result.adapter", f"{PREFIX}/adapter\u202e"),
    "long-adapter": replaced("result.adapter", f"{PREFIX}/" + "a" * 2048),
    "report-elsewhere": replaced("result.report", "https://evil.example/report.json"),
    "merged-elsewhere": replaced("result.merged", "hf://evil/model"),
    "nan-loss": replaced("result.evaluation.adapter.loss", float("nan")),
    "infinite-text-as-loss": replaced("result.evaluation.adapter.loss", "1e999"),
    "huge-rows": replaced("result.evaluation.rows", 10**30),
    "huge-step": replaced("step", 10**100),
    "speed-as-list": replaced("result.tokensPerSecond", []),
    "reason-of-a-running-pod": replaced("reason", "Training"),
    "reason-of-prepare": replaced("reason", "Prepared"),
    "no-details": replaced("result", None),
}
FAILURE: Final = {
    "checkpoint-elsewhere": replaced("checkpoint.uri", "s3://evil/checkpoints/step-000005-a1"),
    "shell-in-checkpoint": replaced("checkpoint.uri", f"{PREFIX}/$(touch x)"),
    "huge-checkpoint-step": replaced("checkpoint.step", 10**30),
    "checkpoint-without-timezone": replaced("checkpoint.time", "2026-03-01T12:00:00"),
}


def changed(message: str, change: Change) -> str:
    content = json.loads(message)
    change(content)
    text = json.dumps(content)
    assert len(text) <= TERMINATION_MESSAGE_BYTES  # the kubelet would truncate it
    return text


@pytest.fixture
async def cluster() -> FakeCluster:
    fake = FakeCluster()
    fake.submit(make_manifest())
    await reconcile_until_stable(fake)
    return fake


def numbers(value: object) -> Iterator[float]:
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from numbers(item)
    elif isinstance(value, int | float):
        yield value


def check_refused(cluster: FakeCluster, names: str) -> None:
    """Check that an API server stores the status, and that no field but a message is foreign.

    A message that cannot be read explains nothing, so that the run is tried again; any other one ends it.
    """
    status = cluster.status
    assert status["phase"] in {"Failed", "Preparing", "Scheduling"}
    assert status["reason"] == Reason.TRAINER_ERROR, status["message"]
    assert names in status["message"]
    jsonschema.validate(status, STATUS)
    assert all(math.isfinite(number) and abs(number) < 2**63 for number in numbers(status))
    output = status.get("output", {})
    assert not {"adapter", "report", "merged"} & set(output)
    assert output.get("prefix", PREFIX) == PREFIX
    assert status.get("checkpoint") is None


@pytest.mark.parametrize("change", PREPARATION.values(), ids=PREPARATION)
async def test_facts_of_a_taken_over_prepare_pod_are_refused(cluster: FakeCluster, change: Change) -> None:
    cluster.end_pod(PREPARE, 0, changed(PREPARED_MESSAGE, change))
    await reconcile_until_stable(cluster)
    check_refused(cluster, "termination message")
    assert {"model", "dataset", "plan", "output"}.isdisjoint(cluster.status)


@pytest.mark.parametrize("change", PUBLISHED_BEFORE.values(), ids=PUBLISHED_BEFORE)
async def test_result_that_prepare_found_elsewhere_is_refused(cluster: FakeCluster, change: Change) -> None:
    cluster.end_pod(PREPARE, 0, changed(ALREADY_PUBLISHED, change))
    await reconcile_until_stable(cluster)
    check_refused(cluster, f"is not below {PREFIX}; find out who can write to the output, or run code in the pod")


async def start_training(cluster: FakeCluster) -> None:
    cluster.end_pod(PREPARE, 0, PREPARED_MESSAGE)
    await reconcile_until_stable(cluster)
    cluster.start_pod(TRAIN)
    await reconcile_until_stable(cluster)


@pytest.mark.parametrize("change", TRAINING.values(), ids=TRAINING)
@pytest.mark.parametrize("code", [0, 1])
async def test_result_of_a_taken_over_training_pod_is_refused(cluster: FakeCluster, change: Change, code: int) -> None:
    await start_training(cluster)
    cluster.end_pod(TRAIN, code, changed(PUBLISHED_MESSAGE, change))
    await reconcile_until_stable(cluster)
    check_refused(cluster, "termination message")
    assert cluster.status["attempts"][0]["reason"] == Reason.TRAINER_ERROR


@pytest.mark.parametrize("change", FAILURE.values(), ids=FAILURE)
async def test_checkpoint_of_a_taken_over_training_pod_is_refused(cluster: FakeCluster, change: Change) -> None:
    await start_training(cluster)
    cluster.end_pod(TRAIN, 1, changed(INTERRUPTED, change))
    await reconcile_until_stable(cluster)
    check_refused(cluster, "termination message")


@pytest.mark.parametrize("uri", ["s3://evil/x", "$(touch x)", f"{PREFIX}/../x", f"{PREFIX}/checkpoints/$(x)"])
async def test_checkpoint_that_a_taken_over_pod_reports_is_left_out(cluster: FakeCluster, uri: str) -> None:
    await start_training(cluster)
    report = Progress(updated_at=cluster.now, step=5, checkpoint=Checkpoint(step=5, uri=uri, time=NOW))
    await reconcile_until_stable(cluster, report)
    assert (cluster.status["phase"], cluster.status["step"]) == ("Training", "5/180")
    assert "checkpoint" not in cluster.status
    assert "checkpoint" not in cluster.status["lastReport"]


async def test_honest_messages_are_accepted(cluster: FakeCluster) -> None:
    await start_training(cluster)
    cluster.end_pod(TRAIN, 1, INTERRUPTED)
    await reconcile_until_stable(cluster)
    assert (cluster.status["reason"], cluster.status["checkpoint"]["uri"]) == (Reason.S3_DENIED, CHECKPOINT["uri"])
    other = FakeCluster()
    other.submit(make_manifest())
    await reconcile_until_stable(other)
    other.end_pod(PREPARE, 0, ALREADY_PUBLISHED)
    await reconcile_until_stable(other)
    assert (other.status["reason"], other.status["output"]["adapter"]) == ("AlreadyPublished", make_result().adapter)
