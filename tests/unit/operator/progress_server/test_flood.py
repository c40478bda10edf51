"""A flood of the progress server beside the operator's own calls, with an API server on loopback that counts them."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any, Final

import pytest
from aiohttp import ClientSession, TCPConnector, web
from kubernetes.aio import client

from qlora_api import names
from qlora_operator.cluster.cache import ChildCache
from qlora_operator.cluster.http import Api
from qlora_operator.cluster.interface import PodIdentity
from qlora_operator.cluster.kube_cluster import KubeCluster
from qlora_operator.controller.controller import Controller
from qlora_operator.controller.metrics import Metrics
from qlora_operator.progress_server import ProgressServer
from qlora_operator.resources import Installation
from qlora_operator.settings import Settings
from tests.make import NOW, REF, make_token

CLIENTS: Final = 100
POD: Final = PodIdentity(REF.namespace, "support-bot-1-0-abcde", "uid-1")


class ApiServer:
    """Answers TokenReviews with 429 and a long Retry-After, or never; and everything else at once."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.overloaded = False
        self.asked = asyncio.Event()
        self.closing = asyncio.Event()

    async def answer(self, request: web.Request) -> web.Response:
        kind = request.path.rpartition("/")[2]
        self.calls[kind] += 1
        if kind != "tokenreviews":
            return web.json_response({"metadata": {"uid": "uid"}})
        self.asked.set()
        if self.overloaded:
            return web.json_response({}, status=429, headers={"Retry-After": "60"})
        await self.closing.wait()
        return web.json_response({})


@pytest.fixture
async def stub() -> ApiServer:
    return ApiServer()


@pytest.fixture
async def configuration(stub: ApiServer) -> AsyncIterator[client.Configuration]:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", stub.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    configuration = client.Configuration()
    configuration.host = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield configuration
    stub.closing.set()
    await runner.cleanup()


class Operator:
    """A controller's progress server, and the client with which it reconciles."""

    def __init__(self, api: Api, server: ProgressServer) -> None:
        self.api = api
        self.server = server

    async def post(self, number: int) -> int:
        """Post with a forged token, from a connection of its own, and return the status; 0: it was not served."""
        url = f"http://127.0.0.1:{self.server.port}{names.progress_path(*REF)}"
        token = make_token(POD._replace(uid=f"uid-{number}"), exp=NOW.timestamp() * 2)
        try:
            async with (
                ClientSession(connector=TCPConnector(limit=0)) as session,
                session.post(url, headers={"Authorization": f"Bearer {token}"}, json={}) as answer,
            ):
                return answer.status
        except OSError:
            return 0


@pytest.fixture
async def operator(configuration: client.Configuration, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Operator]:
    monkeypatch.setattr("qlora_operator.progress_server.connections.MAX_CONNECTIONS_PER_ADDRESS", CLIENTS)
    monkeypatch.setattr("qlora_operator.progress_server.pod_authorizer.REVIEW_SECONDS", 1.0)
    api, review_api = Api(configuration), Api(configuration)
    settings = Settings(Installation("trainer:1"), progress_port=0)
    controller = Controller(settings, api, Metrics(lambda: True), review_api=review_api)
    server = await controller._start_progress_server()
    yield Operator(api, server)
    await server.cleanup()
    await controller.stop()


async def read_job(operator: Operator) -> Any:
    """Call the API server as a reconcile does; it must not wait for anything that the flood does."""
    async with asyncio.timeout(60):
        return await operator.api.request("GET", "/api/own")


async def test_flood_that_is_never_answered_holds_one_call(
    operator: Operator, stub: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora_operator.progress_server.pod_authorizer.REVIEW_SECONDS", 600.0)
    flood = [asyncio.create_task(operator.post(number)) for number in range(CLIENTS)]
    await stub.asked.wait()
    for _ in range(5):
        await read_job(operator)
    waiting = set(flood)
    while len(waiting) > 1:  # the one that is being reviewed
        _, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    assert stub.calls == {"tokenreviews": 1, "own": 5}
    stub.closing.set()
    assert set(await asyncio.gather(*flood)) <= {0, 401, 503}


async def test_overloaded_api_server_silences_reviews_only(operator: Operator, stub: ApiServer) -> None:
    stub.overloaded = True
    assert {await operator.post(number) for number in range(3)} == {503}
    await read_job(operator)
    assert stub.calls == {"tokenreviews": 1, "own": 1}


async def test_reviews_of_the_controller_use_their_own_client(configuration: client.Configuration) -> None:
    api, review_api = Api(configuration), Api(configuration)
    controller = Controller(Settings(Installation("a:1")), api, Metrics(lambda: True), review_api=review_api)
    reviewer = controller._authorizer._reviewer
    assert isinstance(reviewer, KubeCluster)
    assert (reviewer._api, controller._cluster._api) == (review_api, api)
    assert isinstance(reviewer._cache, ChildCache)
    assert reviewer._cache is controller.child_cache
    await controller.stop()
