"""What a conflict means for a write, by an API server that answers every call with one."""

from typing import Any, NoReturn

import pytest
from kubernetes.aio import client

from qlora_operator.cluster.api import Api, ConflictError
from qlora_operator.cluster.children import Children
from qlora_operator.cluster.kube import KubeCluster
from qlora_operator.cluster.ports import ClusterBusyError

EVENT = {"apiVersion": "events.k8s.io/v1", "kind": "Event", "reason": "Prepared", "metadata": {"namespace": "ml"}}
DEADLINE = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"namespace": "ml", "name": "bot-1"}}


class ConflictingApi(Api):
    def __init__(self, reason: str) -> None:
        super().__init__(client.Configuration())
        self._reason = reason

    async def request(self, *_: Any, **__: Any) -> NoReturn:
        raise ConflictError(409, self._reason, "409")


@pytest.fixture
async def conflicting(request: pytest.FixtureRequest) -> Any:
    api = ConflictingApi(request.param)
    yield KubeCluster(api, Children())
    await api.close()


@pytest.mark.parametrize("conflicting", ["AlreadyExists"], indirect=True)
async def test_an_event_that_exists_was_told(conflicting: KubeCluster) -> None:
    assert await conflicting.tell(EVENT) is None


@pytest.mark.parametrize("conflicting", ["Conflict"], indirect=True)
async def test_an_event_that_met_another_conflict_is_told_later(conflicting: KubeCluster) -> None:
    with pytest.raises(ClusterBusyError):
        await conflicting.tell(EVENT)


@pytest.mark.parametrize("conflicting", ["Conflict"], indirect=True)
async def test_a_child_that_changed_is_looked_at_again(conflicting: KubeCluster) -> None:
    with pytest.raises(ClusterBusyError):
        await conflicting.patch(DEADLINE)
