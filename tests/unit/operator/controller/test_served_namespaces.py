"""Namespaces: one that is forbidden or fails is retried, reported, and does not keep the others from being served."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest
from kopf._cogs.clients import watching

from qlora_api.job_ref import JobRef
from qlora_operator.cluster.http import Api, ApiError, NotFoundError
from qlora_operator.cluster.interface import ClusterBusyError
from qlora_operator.controller import controller as module
from qlora_operator.controller.controller import Controller
from qlora_operator.controller.kopf_watches import MAX_RETRY_SECONDS, isolated_watches
from qlora_operator.controller.metrics import Metrics
from qlora_operator.controller.served_namespaces import LIST, ServedNamespaces
from qlora_operator.resources import Installation
from qlora_operator.settings import Settings
from tests.make import NOW, make_manifest

NAMESPACES = ("team-a", "team-b")
FORBIDDEN = ApiError(403, "Forbidden", "qlorajobs.qlora.dev is forbidden")


class ApiByNamespace(Api):
    """An API server with one QLoRAJob in each namespace, and errors for some namespaces."""

    def __init__(self, **errors: Exception | None) -> None:
        self.errors = {name.replace("_", "-"): error for name, error in errors.items()}
        self.hanging: set[str] = set()

    async def close(self) -> None:
        pass

    async def request(self, _method: str, path: str, *_: Any, **__: Any) -> dict[str, Any]:
        namespace = path.partition("/namespaces/")[2].partition("/")[0]
        if namespace in self.hanging:
            await asyncio.Event().wait()
        if error := self.errors.get(namespace):
            raise error
        manifest = make_manifest(namespace=namespace)
        metadata = {"uid": namespace, "generation": 1, "resourceVersion": "5", "creationTimestamp": NOW.isoformat()}
        item = {**manifest, "metadata": {**manifest["metadata"], **metadata}}
        return {"metadata": {"resourceVersion": "9"}, "items": [item] if path.endswith("qlorajobs") else []}


def make_controller(api: Api, namespaces: tuple[str, ...] = NAMESPACES) -> Controller:
    settings = Settings(Installation("trainer:1"), namespaces, progress_port=0, resync=timedelta(minutes=10))
    return Controller(settings, api, Metrics(lambda: True))


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CRD_TIMEOUT", timedelta(0))
    monkeypatch.setattr(module, "FIRST_RETRY", timedelta(milliseconds=20))

    async def nothing(*_: Any) -> None:
        return None

    monkeypatch.setattr(Controller, "_reconcile", nothing)


def watch(controller: Controller, *namespaces: str) -> None:
    """Let all kinds of the namespaces be watched."""
    for namespace in namespaces:
        for kind in ("qlorajobs", "jobs", "pods"):
            controller.served_namespaces.on_success(namespace, kind)


def served(controller: Controller) -> dict[str, bool]:
    return dict(controller.served_namespaces.by_namespace())


@pytest.mark.parametrize(
    "error", [FORBIDDEN, NotFoundError(404, "NotFound", "404"), ClusterBusyError("504"), KeyError("items")]
)
async def test_failing_namespace_is_retried_while_the_other_is_served(error: Exception) -> None:
    api = ApiByNamespace(team_b=error)
    controller = make_controller(api)
    await controller.start()
    watch(controller, *NAMESPACES)
    assert served(controller) == {"team-a": True, "team-b": False}
    assert controller.is_working()
    metrics = controller.metrics.render().decode()
    assert 'qlora_operator_namespace_served{namespace="team-a"} 1.0' in metrics
    assert 'qlora_operator_namespace_served{namespace="team-b"} 0.0' in metrics
    api.errors["team-b"] = None
    async with asyncio.timeout(5):
        while not all(served(controller).values()):  # noqa: ASYNC110 (the condition is the controller's)
            await asyncio.sleep(0.01)
    await controller.stop()


@pytest.mark.parametrize("error", [FORBIDDEN, ClusterBusyError("504"), KeyError("items")])
async def test_namespace_that_fails_later_keeps_the_other(error: Exception) -> None:
    api = ApiByNamespace()
    controller = make_controller(api)
    await controller.start()
    watch(controller, *NAMESPACES)
    api.errors["team-a"] = error
    queued: list[JobRef] = []
    controller.queue.add = queued.append  # type: ignore[method-assign]
    await controller.resync()
    assert served(controller) == {"team-a": False, "team-b": True}
    assert queued == [JobRef("team-b", "support-bot")]
    assert controller.is_working()
    await controller.stop()


async def test_startup_without_any_namespace_fails() -> None:
    controller = make_controller(ApiByNamespace(team_a=FORBIDDEN, team_b=FORBIDDEN))
    with pytest.raises(ApiError, match="forbidden"):
        await controller.start()
    assert not controller.is_working()


async def test_startup_that_hangs_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STARTUP_SECONDS", 0.02)
    api = ApiByNamespace()
    api.hanging = set(NAMESPACES)
    with pytest.raises(TimeoutError):
        await make_controller(api).start()


async def test_namespace_that_hangs_at_startup_keeps_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STARTUP_SECONDS", 0.5)
    api = ApiByNamespace()
    api.hanging = {"team-a"}
    controller = make_controller(api)
    await controller.start()
    watch(controller, *NAMESPACES)
    assert served(controller) == {"team-a": False, "team-b": True}
    await controller.stop()


async def test_stalled_watch_of_an_unserved_namespace_is_no_reason_to_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = make_controller(ApiByNamespace())
    await controller.start()
    watch(controller, *NAMESPACES)
    monkeypatch.setattr(controller.watch_health, "overdue", lambda: (JobRef("team-b", "support-bot"),))
    assert "the watch is stalled" in str(controller.unhealthy_reason())
    controller.served_namespaces.on_failure("team-b", "pods", FORBIDDEN)
    assert controller.unhealthy_reason() is None
    await controller.stop()


def test_time_without_a_namespace_counts_from_the_last_one_lost() -> None:
    now = 0.0
    namespaces = ServedNamespaces(NAMESPACES, ("pods",), lambda: now)
    now = 50.0
    assert namespaces.unserved_seconds() == 50.0
    for part in (LIST, "pods"):
        namespaces.on_success("team-a", part)
    assert namespaces.unserved_seconds() == 0.0
    now = 100.0
    namespaces.on_failure("team-a", "pods", FORBIDDEN)
    namespaces.on_failure("team-b", "pods", FORBIDDEN)
    now = 130.0
    assert namespaces.unserved_seconds() == 30.0
    assert namespaces.why() == "ApiError: qlorajobs.qlora.dev is forbidden"


class Kind:
    plural = "pods"


async def test_watch_that_is_rejected_is_retried_with_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = 0
    pauses: list[float] = []

    async def infinite_watch(*, resource: Any, namespace: str) -> AsyncIterator[Any]:  # noqa: ARG001 (kopf's signature)
        nonlocal attempts
        attempts += 1
        if attempts <= 8:
            raise watching.WatchingError("403")
        yield watching.Bookmark.LISTED
        yield {"type": "ADDED"}

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(watching, "infinite_watch", infinite_watch)
    namespaces = ServedNamespaces(["team-b"], ("pods",), lambda: 0.0)
    namespaces.on_success("team-b", LIST)
    with isolated_watches(namespaces, sleep):
        events = watching.infinite_watch(resource=Kind, namespace="team-b")  # type: ignore[call-arg, arg-type]
        assert await anext(aiter(events)) is watching.Bookmark.LISTED
        assert await anext(aiter(events)) == {"type": "ADDED"}
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, MAX_RETRY_SECONDS, MAX_RETRY_SECONDS]
    assert namespaces.is_served("team-b")
    assert watching.infinite_watch is infinite_watch


def test_kopf_takes_its_watches_from_the_generator_that_is_replaced() -> None:
    """A release of kopf that moves it would end the isolation silently."""
    from kopf._core.reactor import queueing  # noqa: PLC0415 (only here)

    assert queueing.watching is watching
    assert "infinite_watch" in queueing.watcher.__code__.co_names
