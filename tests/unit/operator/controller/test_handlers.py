"""kopf's side: what it may do; and what /healthz says of the runtime."""

import asyncio
from datetime import timedelta
from typing import Any, cast

import kopf
import pytest
from aiohttp import web

from qlora_operator.cluster.http import Api
from qlora_operator.controller import handlers
from qlora_operator.controller.controller import STUCK_SECONDS, Controller
from qlora_operator.controller.metrics import Metrics
from qlora_operator.controller.watch_health import OVERDUE_SECONDS
from qlora_operator.resources import Installation
from qlora_operator.settings import Settings
from tests.make import REF, UID


@pytest.fixture
async def runtime(monkeypatch: pytest.MonkeyPatch) -> Controller:
    """A runtime whose parts run, without a cluster."""
    runtime = Controller(Settings(Installation("trainer:1")), cast("Api", None), Metrics(lambda: True))
    monkeypatch.setattr(runtime.queue, "alive", lambda: True)
    monkeypatch.setattr(runtime, "_server", web.AppRunner(web.Application()))
    monkeypatch.setattr(runtime, "_resync", asyncio.get_running_loop().create_future())
    return runtime


async def test_a_healthy_operator(runtime: Controller) -> None:
    assert runtime.unhealthy_reason() is None


async def test_a_replica_that_waits_is_healthy() -> None:
    assert (
        Controller(Settings(Installation("trainer:1")), cast("Api", None), Metrics(lambda: True)).unhealthy_reason()
        is None
    )


async def test_overdue_watch_is_unhealthy(runtime: Controller, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime.watch_health.expect_version(REF, "10")
    later = asyncio.get_running_loop().time() + OVERDUE_SECONDS + 1
    monkeypatch.setattr(runtime.watch_health, "_clock", lambda: later)
    assert "the watch is stalled" in str(runtime.unhealthy_reason())


async def test_stuck_queue_is_unhealthy(runtime: Controller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime.queue, "oldest_age", lambda: STUCK_SECONDS + 1)
    assert "the work queue is stuck" in str(runtime.unhealthy_reason())


async def test_dead_worker_is_unhealthy(runtime: Controller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime.queue, "alive", lambda: False)
    assert runtime.unhealthy_reason() == "a worker has stopped"


async def test_own_status_write_enqueues_nothing(runtime: Controller) -> None:
    runtime._written_versions[REF] = "10"
    runtime.on_job_update(REF, {"metadata": {"resourceVersion": "10"}})
    assert runtime.queue.depth == 0
    runtime.on_job_update(REF, {"metadata": {"resourceVersion": "11"}})
    assert runtime.queue.depth == 1


async def test_a_child_s_event_is_its_owner_s_key(runtime: Controller) -> None:
    event = {"type": "ADDED", "object": make_child_item("1")}
    await handlers.on_child_job_event(event=event, memo=kopf.Memo(runtime=runtime))
    assert runtime.queue.depth == 1
    await runtime.queue.drain(timedelta(0))


async def test_unchanged_child_event_enqueues_nothing(runtime: Controller) -> None:
    runtime.child_cache.pods.update(make_child_item("1"))
    event = {"type": "MODIFIED", "object": make_child_item("2")}
    await handlers.on_pod_event(event=event, memo=kopf.Memo(runtime=runtime))
    assert runtime.queue.depth == 0


async def test_deleted_child_enqueues_job(runtime: Controller) -> None:
    event = {"type": "DELETED", "object": make_child_item("1")}
    await handlers.on_pod_event(event=event, memo=kopf.Memo(runtime=runtime))
    assert runtime.queue.depth == 1
    await runtime.queue.drain(timedelta(0))


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
