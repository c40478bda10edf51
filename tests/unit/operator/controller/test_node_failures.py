"""What the controller does with the failures of nodes that statuses show."""

from datetime import timedelta
from types import SimpleNamespace
from typing import Any, cast

import pytest

from qlora_api.job_ref import JobRef
from qlora_api.reasons import Reason
from qlora_api.v1alpha1 import Attempt, QLoRAJobStatus
from qlora_operator.cluster.http import Api
from qlora_operator.controller.controller import Controller
from qlora_operator.controller.metrics import Metrics
from qlora_operator.controller.result import ReconcileRequest, ReconcileResult
from qlora_operator.lifecycle import ReconcileContext
from qlora_operator.models import Manifest, RawJob
from qlora_operator.resources import Installation
from qlora_operator.settings import Settings
from tests.make import NOW, UID


class Events:
    """Takes the place of the cluster, and keeps its Events."""

    def __init__(self) -> None:
        self.recorded: list[Manifest] = []

    async def record_event(self, event: Manifest) -> None:
        self.recorded.append(event)


@pytest.fixture
def events() -> Events:
    return Events()


@pytest.fixture
async def controller(monkeypatch: pytest.MonkeyPatch, events: Events) -> Controller:
    made = Controller(Settings(Installation("trainer:1")), cast("Api", None), Metrics(lambda: True), clock=lambda: NOW)
    monkeypatch.setattr(made, "_cluster", events)
    return made


async def finish_attempt(controller: Controller, run: str, **change: Any) -> None:
    """Let an attempt of a run fail on gpu-1, each run in a namespace of its own."""
    ref = JobRef(f"team-{run}", run)
    values: dict[str, Any] = {"number": 1, "job": f"{run}-1", "reason": Reason.ACCELERATOR_MISSING, "node": "gpu-1"}
    attempt = Attempt.model_validate({**values, "finished_at": NOW, **change})
    raw = RawJob(ref, UID, 1, "1", NOW, deleting=False, spec={}, status={})
    request = ReconcileRequest(raw, QLoRAJobStatus(), ReconcileContext(NOW))
    result = ReconcileResult(written_version="2", status=QLoRAJobStatus(attempts=(attempt,)), request=request)
    context = controller._make_context(ref)
    controller.metrics.on_reconciled(ref, result)
    await controller._update_node_failures(ref, result, context)


async def test_node_of_two_runs_is_quarantined_with_an_event_and_metrics(
    controller: Controller, events: Events
) -> None:
    await finish_attempt(controller, "well", node="gpu-2", reason=Reason.INTERRUPTED, started_at=NOW)
    await finish_attempt(controller, "a")
    assert (events.recorded, controller._make_context(JobRef("ml", "c")).quarantined_nodes) == ([], {})
    await finish_attempt(controller, "b")
    until = NOW + timedelta(hours=1)
    assert controller._make_context(JobRef("web", "c")).quarantined_nodes == {"gpu-1": until}
    (event,) = events.recorded
    assert (event["reason"], event["type"], event["regarding"]["name"]) == ("NodeQuarantined", "Warning", "b")
    assert "node gpu-1 ended attempts of several QLoRAJobs" in event["note"]
    await finish_attempt(controller, "c")
    assert len(events.recorded) == 1
    exported = controller.metrics.render().decode()
    assert 'qlora_node_attempts_failed_total{node="gpu-1"} 3.0' in exported
    assert "qlora_nodes_quarantined 1.0" in exported


async def test_failure_that_blames_no_node_quarantines_none(controller: Controller, events: Events) -> None:
    for run in ("a", "b"):
        await finish_attempt(controller, run, reason=Reason.TRAINER_ERROR)
    assert events.recorded == []
    assert "qlora_node_attempts_failed_total{" not in controller.metrics.render().decode()


async def test_context_has_the_reports_of_other_runs(controller: Controller) -> None:
    report = SimpleNamespace(updated_at=NOW)
    controller._reports.put(JobRef("ml", "a"), cast("Any", report))
    assert controller._make_context(JobRef("ml", "b")).reception.last_reports == (NOW,)
    assert controller._make_context(JobRef("ml", "a")).reception.last_reports == ()
