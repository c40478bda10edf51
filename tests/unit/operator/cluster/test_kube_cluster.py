"""What a conflict or a refusal means for a write, by API servers that answer with one."""

from collections.abc import AsyncIterator
from typing import Any, NoReturn

import pytest
from kubernetes.aio import client

from qlora_operator.cluster.cache import ChildCache
from qlora_operator.cluster.http import Api, ApiError, ConflictError, NotFoundError
from qlora_operator.cluster.interface import AdmissionDeniedError, ClusterBusyError
from qlora_operator.cluster.kube_cluster import KubeCluster

EVENT = {"apiVersion": "events.k8s.io/v1", "kind": "Event", "reason": "Prepared", "metadata": {"namespace": "ml"}}
DEADLINE = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"namespace": "ml", "name": "bot-1"}}
CONFIG = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"namespace": "ml", "name": "bot-1"}}


class ConflictingApi(Api):
    def __init__(self, reason: str) -> None:
        super().__init__(client.Configuration())
        self._reason = reason

    async def request(self, *_: Any, **__: Any) -> NoReturn:
        raise ConflictError(409, self._reason, "409")


@pytest.fixture
async def conflicting(request: pytest.FixtureRequest) -> Any:
    api = ConflictingApi(request.param)
    yield KubeCluster(api, ChildCache())
    await api.close()


@pytest.mark.parametrize("conflicting", ["AlreadyExists"], indirect=True)
async def test_existing_event_is_no_error(conflicting: KubeCluster) -> None:
    assert await conflicting.record_event(EVENT) is None


@pytest.mark.parametrize("conflicting", ["Conflict"], indirect=True)
async def test_event_conflict_is_retried(conflicting: KubeCluster) -> None:
    with pytest.raises(ClusterBusyError):
        await conflicting.record_event(EVENT)


@pytest.mark.parametrize("conflicting", ["Conflict"], indirect=True)
async def test_changed_child_raises_cluster_busy(conflicting: KubeCluster) -> None:
    with pytest.raises(ClusterBusyError):
        await conflicting.patch(DEADLINE)


class ConfigMapThatExists(Api):
    """The ConfigMap is there already, and the change of it meets an error."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(client.Configuration())
        self._error = error

    async def request(self, method: str, *_: Any, **__: Any) -> dict[str, Any]:
        if method == "POST":
            raise ConflictError(409, "AlreadyExists", "409")
        if method == "PATCH":
            raise self._error
        return {"metadata": {"resourceVersion": "7"}}


@pytest.fixture
async def outdated(request: pytest.FixtureRequest) -> AsyncIterator[KubeCluster]:
    api = ConfigMapThatExists(request.param)
    yield KubeCluster(api, ChildCache())
    await api.close()


@pytest.mark.parametrize("outdated", [ApiError(403, "Forbidden", "a policy says no")], indirect=True)
async def test_denied_patch_raises_admission_denied(outdated: KubeCluster) -> None:
    with pytest.raises(AdmissionDeniedError, match="ConfigMap bot-1 was denied: a policy says no"):
        await outdated.ensure(CONFIG)


@pytest.mark.parametrize(
    "outdated", [ConflictError(409, "Conflict", "409"), NotFoundError(404, "NotFound", "404")], indirect=True
)
async def test_child_changed_or_deleted_meanwhile_raises_cluster_busy(outdated: KubeCluster) -> None:
    with pytest.raises(ClusterBusyError):
        await outdated.ensure(CONFIG)
