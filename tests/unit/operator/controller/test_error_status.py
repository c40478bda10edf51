"""An error in a reconcile: in the status of that QLoRAJob once, in a metric, and gone after the next good reconcile."""

import json
from datetime import timedelta
from typing import Any, NoReturn

import pytest

from qlora_api.v1alpha1 import Progress
from qlora_operator.cluster.http import Api, ApiError
from qlora_operator.cluster.interface import ClusterBusyError, InvalidStatusError
from qlora_operator.controller import controller as module
from qlora_operator.controller.controller import Controller
from qlora_operator.controller.error_status import MAX_ERROR, describe_error
from qlora_operator.controller.metrics import Metrics
from qlora_operator.resources import Installation
from qlora_operator.settings import Settings
from tests.fakes import FakeCluster
from tests.make import NOW, REF, make_manifest

RECONCILING = "the operator fails to reconcile this run, and retries: "


class Failure:
    """Replaces reconcile and fails with an error, if there is one."""

    def __init__(self, original: Any) -> None:
        self.original = original
        self.error: Exception | None = None

    async def __call__(self, *arguments: Any) -> Any:
        if self.error is not None:
            raise self.error
        return await self.original(*arguments)


@pytest.fixture
def failure(monkeypatch: pytest.MonkeyPatch) -> Failure:
    failure = Failure(module.reconcile)
    monkeypatch.setattr(module, "reconcile", failure)
    return failure


@pytest.fixture
def cluster() -> FakeCluster:
    cluster = FakeCluster()
    cluster.submit(make_manifest())
    return cluster


@pytest.fixture
async def controller(cluster: FakeCluster) -> Controller:
    api: Any = Api.__new__(Api)
    controller = Controller(Settings(Installation("t:1")), api, Metrics(lambda: True), lambda: cluster.now)
    controller._cluster = cluster  # type: ignore[assignment]
    return controller


async def fail(controller: Controller, error: Exception) -> None:
    with pytest.raises(type(error)):
        await controller._reconcile(REF)


def conditions(cluster: FakeCluster) -> dict[str, dict[str, Any]]:
    return {condition["type"]: condition for condition in cluster.status["conditions"]}


async def settle(controller: Controller) -> None:
    for _ in range(5):
        await controller._reconcile(REF)


async def test_error_of_a_first_reconcile_is_in_the_status(
    controller: Controller, cluster: FakeCluster, failure: Failure
) -> None:
    failure.error = KeyError("hidden_size")
    await fail(controller, failure.error)
    message = f"{RECONCILING}KeyError: 'hidden_size'"
    assert (cluster.status["phase"], cluster.status["message"]) == ("Pending", message)
    assert conditions(cluster)["Reconciling"]["message"] == message
    assert 'qlora_operator_reconcile_errors_total{error="KeyError"} 1.0' in controller.metrics.render().decode()
    assert 'qlora_operator_reconcile_total{result="error"} 1.0' in controller.metrics.render().decode()


async def test_repeated_error_is_written_once(controller: Controller, cluster: FakeCluster, failure: Failure) -> None:
    await settle(controller)
    before = dict(cluster.status)
    failure.error = KeyError("hidden_size")
    for _ in range(3):
        cluster.pass_time(timedelta(minutes=1))
        await fail(controller, failure.error)
    assert (cluster.status["phase"], cluster.status["reason"]) == (before["phase"], before["reason"])
    written = cluster.writes.count(("status", before["phase"]))
    failure.error = ApiError(403, "Forbidden", "jobs.batch is forbidden")
    await fail(controller, failure.error)
    assert cluster.writes.count(("status", before["phase"])) == written + 1
    assert conditions(cluster)["Reconciling"]["message"] == f"{RECONCILING}ApiError: jobs.batch is forbidden"
    failure.error = None
    await settle(controller)
    assert (cluster.status["phase"], cluster.status["reason"]) == (before["phase"], before["reason"])
    assert RECONCILING not in json.dumps(cluster.status)


async def test_event_of_the_written_error_is_skipped(
    controller: Controller, cluster: FakeCluster, failure: Failure
) -> None:
    failure.error = KeyError("hidden_size")
    await fail(controller, failure.error)
    assert cluster.job
    controller.on_job_update(REF, cluster.job)
    assert controller.queue.depth == 0


@pytest.mark.parametrize("refusal", [InvalidStatusError("422"), ClusterBusyError("409"), ApiError(403, "", "403")])
async def test_error_that_cannot_be_written_is_raised_as_it_was(
    controller: Controller,
    cluster: FakeCluster,
    failure: Failure,
    refusal: Exception,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def refuse(*_: Any) -> NoReturn:
        raise refusal

    monkeypatch.setattr(cluster, "write_status", refuse)
    failure.error = KeyError("hidden_size")
    await fail(controller, failure.error)
    assert cluster.writes == []


async def test_error_after_the_end_keeps_the_outcome(
    controller: Controller, cluster: FakeCluster, failure: Failure
) -> None:
    cluster.change(lora={"rank": 0})
    await settle(controller)
    before = cluster.status
    assert before["phase"] == "Failed"
    failure.error = ApiError(403, "Forbidden", "jobs.batch is forbidden")
    await fail(controller, failure.error)
    assert (cluster.status["phase"], cluster.status["message"]) == ("Failed", before["message"])
    reconciling = conditions(cluster)["Reconciling"]
    assert (reconciling["status"], reconciling["message"]) == (
        "False", f"{RECONCILING}ApiError: jobs.batch is forbidden",
    )  # fmt: skip
    failure.error = None
    await settle(controller)
    assert conditions(cluster)["Reconciling"]["message"] == before["message"]


async def test_status_that_cannot_be_read_is_kept(
    controller: Controller, cluster: FakeCluster, failure: Failure
) -> None:
    await settle(controller)
    assert cluster.job
    odd = {"startedAt": "yesterday", "conditions": "none", "fromANewerOperator": {"a": 1}}
    cluster.job["status"] |= odd
    failure.error = ValueError("startedAt")
    await fail(controller, failure.error)
    assert cluster.status["message"] == f"{RECONCILING}ValueError: startedAt"
    assert {key: cluster.status[key] for key in odd if key != "conditions"} == {
        "startedAt": "yesterday", "fromANewerOperator": {"a": 1},
    }  # fmt: skip


def test_text_of_an_error_is_one_bounded_line() -> None:
    text = describe_error(ValueError("\x1b[31m\n" + "x" * 10_000))
    assert text.isprintable()
    assert len(text) <= len(RECONCILING) + MAX_ERROR


async def test_late_report_of_a_deleted_run_is_dropped(controller: Controller, cluster: FakeCluster) -> None:
    await settle(controller)
    cluster.job = None
    controller._reports.put(REF, Progress(updated_at=NOW), "uid")
    controller._written_versions[REF] = "10"
    await controller._reconcile(REF)
    assert controller._reports.get(REF) is None
    assert controller._written_versions == {}
    assert controller.metrics.jobs._phases == {}


async def test_deletion_during_a_reconcile_leaves_nothing(controller: Controller, cluster: FakeCluster) -> None:
    assert cluster.job
    item = cluster.job
    controller.queue._active[REF] = 0.0
    controller.on_job_delete(REF, item)
    await controller._reconcile(REF)  # the one under way ends
    del controller.queue._active[REF]
    cluster.job = None
    assert REF in controller.queue._since
    await controller._reconcile(REF)  # the repeated one
    assert controller.metrics.jobs._phases == {}
