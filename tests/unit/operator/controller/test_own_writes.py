"""What the controller does with the events of its own status writes."""

from typing import Any, cast

import pytest

from qlora_api.names import Phase
from qlora_api.reasons import Reason
from qlora_api.v1alpha1 import Progress, QLoRAJobStatus
from qlora_operator.cluster.http import Api
from qlora_operator.controller.controller import Controller, only_progress
from qlora_operator.controller.metrics import Metrics
from qlora_operator.controller.reconcile import reconcile
from qlora_operator.controller.result import ReconcileRequest, ReconcileResult
from qlora_operator.lifecycle import ReconcileContext
from qlora_operator.models import RawJob
from qlora_operator.resources import Installation
from qlora_operator.settings import Settings
from tests.fakes import FakeCluster
from tests.make import INSTALLATION, NOW, PREPARED_MESSAGE, REF, UID, make_manifest
from tests.unit.operator.life import PREPARE, TRAIN, reconcile_until_stable


def event(version: str, phase: str) -> dict[str, Any]:
    """A QLoRAJob as a watch delivers it."""
    manifest = make_manifest()
    manifest["metadata"] |= {
        "uid": UID, "generation": 1, "resourceVersion": version, "creationTimestamp": "2026-03-01T12:00:00Z",
    }  # fmt: skip
    return manifest | {"status": {"phase": phase}}


@pytest.fixture
async def controller() -> Controller:
    return Controller(Settings(Installation("trainer:1")), cast("Api", None), Metrics(lambda: True), clock=lambda: NOW)


async def test_own_write_of_a_running_run_is_kept_for_its_next_report(controller: Controller) -> None:
    controller._on_written(REF, "7")
    controller.on_job_update(REF, event("7", "Training"))
    assert controller.queue.depth == 0
    kept = controller._job_cache.pop(REF)
    assert kept is not None
    assert kept.resource_version == "7"


async def test_own_write_of_any_other_run_is_not_kept(controller: Controller) -> None:
    controller.on_job_update(REF, event("6", "Training"))
    controller._on_written(REF, "7")
    controller.on_job_update(REF, event("7", "Succeeded"))
    assert controller._job_cache.pop(REF) is None, "ten thousand finished runs would be held for nothing"


async def test_write_of_somebody_else_is_reconciled(controller: Controller) -> None:
    controller._on_written(REF, "7")
    controller.on_job_update(REF, event("8", "Training"))
    assert controller.queue.depth == 1


async def test_copy_that_was_taken_for_nothing_is_kept_unless_a_newer_one_arrived(controller: Controller) -> None:
    controller.on_job_update(REF, event("7", "Training"))
    copy = controller._job_cache.take(REF)
    assert copy is not None
    controller._job_cache.put_back(REF, copy)
    kept = controller._job_cache.pop(REF)
    assert kept is not None
    assert kept.resource_version == "7"
    controller.on_job_update(REF, event("8", "Training"))
    controller._job_cache.put_back(REF, copy)
    newer = controller._job_cache.pop(REF)
    assert newer is not None
    assert newer.resource_version == "8"


@pytest.mark.parametrize(
    ("change", "expected"),
    [({"progress": "7%"}, True), ({"message": "pod b runs"}, False), ({"reason": Reason.EVALUATING}, False)],
)
def test_only_transitions_are_logged(change: dict[str, Any], expected: bool) -> None:
    before = QLoRAJobStatus(phase=Phase.TRAINING, reason=Reason.TRAINING, message="pod a runs")
    raw = RawJob(REF, UID, 1, "1", NOW, deleting=False, spec={}, status={})
    request = ReconcileRequest(raw, before, ReconcileContext(NOW))
    result = ReconcileResult(written_version="2", status=before.model_copy(update=change), request=request)
    assert only_progress(result) == expected


async def test_report_of_a_running_run_is_written_without_reading_or_listing() -> None:
    cluster = FakeCluster()
    cluster.submit(make_manifest())
    await reconcile_until_stable(cluster)
    cluster.end_pod(PREPARE, 0, PREPARED_MESSAGE)
    await reconcile_until_stable(cluster)
    cluster.start_pod(TRAIN)
    await reconcile_until_stable(cluster)
    cached = await cluster.read_job(REF)
    calls = (cluster.job_reads, cluster.child_lists, len(cluster.writes))
    context = ReconcileContext(cluster.now, Progress(step=7, updated_at=cluster.now), cluster.reports_since)
    await reconcile(REF, cluster, INSTALLATION, context, cached)
    assert cluster.status["lastReport"]["step"] == 7
    assert (cluster.job_reads, cluster.child_lists, len(cluster.writes) - 1) == calls
