"""kopf handlers: what kopf may do, and the health of the controller."""

import asyncio
from datetime import timedelta
from typing import Any, cast

import kopf
import pytest
from aiohttp import web

from qlora_operator.cluster.http import Api, ApiError
from qlora_operator.controller import handlers
from qlora_operator.controller.controller import STARTUP_SECONDS, STUCK_SECONDS, UNSERVED_SECONDS, Controller
from qlora_operator.controller.metrics import Metrics
from qlora_operator.controller.served_namespaces import LIST
from qlora_operator.controller.watch_health import OVERDUE_SECONDS
from qlora_operator.progress_server import ProgressServer
from qlora_operator.resources import Installation
from qlora_operator.settings import Settings
from tests.make import NOW, REF, UID, make_manifest


@pytest.fixture
async def controller(monkeypatch: pytest.MonkeyPatch) -> Controller:
    """A running controller without a cluster."""
    controller = Controller(Settings(Installation("trainer:1")), cast("Api", None), Metrics(lambda: True))
    monkeypatch.setattr(controller.queue, "alive", lambda: True)
    server = ProgressServer(web.Application(), 0)
    monkeypatch.setattr(server, "alive", lambda: True)
    monkeypatch.setattr(controller, "_server", server)
    monkeypatch.setattr(controller, "_resync", asyncio.get_running_loop().create_future())
    monkeypatch.setattr(controller, "_starting_since", asyncio.get_running_loop().time())
    for part in (LIST, "qlorajobs", "jobs", "pods"):
        controller.served_namespaces.on_success("", part)
    return controller


async def test_running_operator_is_healthy(controller: Controller) -> None:
    assert controller.unhealthy_reason() is None


async def test_standby_is_healthy() -> None:
    assert (
        Controller(Settings(Installation("trainer:1")), cast("Api", None), Metrics(lambda: True)).unhealthy_reason()
        is None
    )


async def test_overdue_watch_is_unhealthy(controller: Controller, monkeypatch: pytest.MonkeyPatch) -> None:
    controller.watch_health.expect_version(REF, "10")
    later = asyncio.get_running_loop().time() + OVERDUE_SECONDS + 1
    monkeypatch.setattr(controller.watch_health, "_clock", lambda: later)
    assert "the watch is stalled" in str(controller.unhealthy_reason())


async def test_stuck_queue_is_unhealthy(controller: Controller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller.queue, "stalled_seconds", lambda: STUCK_SECONDS + 1)
    assert "no reconcile has succeeded for 301 seconds" in str(controller.unhealthy_reason())
    assert not controller.is_working()


async def test_old_queue_is_healthy_while_reconciles_succeed(
    controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(controller.queue, "oldest_age", lambda: 10 * STUCK_SECONDS)
    assert controller.unhealthy_reason() is None
    assert controller.is_working()


async def test_startup_that_does_not_end_is_unhealthy(controller: Controller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller, "_server", None)
    assert controller.unhealthy_reason() is None
    assert not controller.is_working()
    monkeypatch.setattr(controller, "_starting_since", asyncio.get_running_loop().time() - STARTUP_SECONDS - 1)
    assert "start-up has not ended" in str(controller.unhealthy_reason())
    assert controller.stalled_seconds() > STARTUP_SECONDS


async def test_operator_that_serves_no_namespace_is_unhealthy(
    controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    controller.served_namespaces.on_failure("", "pods", ApiError(403, "Forbidden", "pods is forbidden"))
    assert controller.unhealthy_reason() is None
    later = asyncio.get_running_loop().time() + UNSERVED_SECONDS + 1
    monkeypatch.setattr(controller.served_namespaces, "_clock", lambda: later)
    assert controller.unhealthy_reason() == "no namespace can be served: ApiError: pods is forbidden"


async def test_dead_worker_is_unhealthy(controller: Controller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller.queue, "alive", lambda: False)
    assert controller.unhealthy_reason() == "a worker has stopped"


async def test_dead_progress_server_is_unhealthy(controller: Controller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller, "_server", ProgressServer(web.Application(), 0))
    assert controller.unhealthy_reason() == "the progress server has stopped"


async def test_own_status_write_enqueues_nothing(controller: Controller) -> None:
    controller._written_versions[REF] = "10"
    controller.on_job_update(REF, make_item("10"))
    assert controller.queue.depth == 0
    controller.on_job_update(REF, make_item("11"))
    assert controller.queue.depth == 1


@pytest.mark.parametrize(
    "item", [{}, {"metadata": None}, {"metadata": {"resourceVersion": "first"}}, {**make_manifest(), "spec": "none"}]
)
async def test_unreadable_job_event_enqueues_nothing(controller: Controller, item: dict[str, Any]) -> None:
    controller.on_job_update(REF, item)
    controller.on_job_delete(REF, item)
    assert controller.queue.depth == 0


async def test_startup_that_fails_is_not_repeated_by_kopf() -> None:
    [handler] = [
        handler for handler in kopf.get_default_registry()._activities.get_all_handlers()
        if handler.fn is handlers.on_startup
    ]  # fmt: skip
    assert handler.errors is kopf.ErrorsMode.PERMANENT


async def test_child_event_enqueues_owner(controller: Controller) -> None:
    event = {"type": "ADDED", "object": make_child_item("1")}
    await handlers.on_child_job_event(event=event, memo=kopf.Memo(controller=controller))
    assert controller.queue.depth == 1
    await controller.queue.drain(timedelta(0))


async def test_unchanged_child_event_enqueues_nothing(controller: Controller) -> None:
    controller.child_cache.pods.update(make_child_item("1"))
    event = {"type": "MODIFIED", "object": make_child_item("2")}
    await handlers.on_pod_event(event=event, memo=kopf.Memo(controller=controller))
    assert controller.queue.depth == 0


async def test_deleted_child_enqueues_job(controller: Controller) -> None:
    event = {"type": "DELETED", "object": make_child_item("1")}
    await handlers.on_pod_event(event=event, memo=kopf.Memo(controller=controller))
    assert controller.queue.depth == 1
    await controller.queue.drain(timedelta(0))


def make_item(version: str) -> dict[str, Any]:
    manifest = make_manifest()
    metadata = {"uid": UID, "generation": 1, "resourceVersion": version, "creationTimestamp": NOW.isoformat()}
    return {**manifest, "metadata": {**manifest["metadata"], **metadata}}


def make_child_item(version: str) -> dict[str, Any]:
    metadata = {
        "name": "child", "uid": "u", "namespace": REF.namespace, "resourceVersion": version,
        "creationTimestamp": "2026-03-01T12:00:00Z", "labels": {"qlora.dev/job": REF.name, "qlora.dev/role": "train"},
        "ownerReferences": [{"uid": UID, "controller": True}],
    }  # fmt: skip
    return {"metadata": metadata, "spec": {}}


def test_kopf_patches_posts_and_scans_nothing() -> None:
    settings = kopf.OperatorSettings()
    handlers.configure_kopf(settings)
    registry = kopf.get_default_registry()
    assert settings.scanning.disabled
    assert not settings.posting.enabled
    assert not list(registry._changing.get_all_handlers())
    assert not list(registry._spawning.get_all_handlers())
    assert set(settings.watching.label_selectors.values()) == {"app.kubernetes.io/managed-by=qlora-operator"}
