"""What answers of an API server mean, by one that gives any answer."""

import time
from collections.abc import AsyncIterator

import pytest
from aiohttp import web
from kubernetes.aio import client

from qlora_operator.cluster.api import Api, ApiError, ConflictError, NotFoundError
from qlora_operator.cluster.ports import ClusterBusyError


@pytest.fixture
async def api() -> AsyncIterator[Api]:
    """Answers /<status>, and asks for a second."""

    async def answer(request: web.Request) -> web.Response:
        return web.json_response({"reason": "Any"}, status=int(request.path[1:]), headers={"Retry-After": "1"})

    app = web.Application()
    app.router.add_get("/{status}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    configuration = client.Configuration()
    configuration.host = f"http://127.0.0.1:{runner.addresses[0][1]}"
    api = Api(configuration)
    yield api
    await api.close()
    await runner.cleanup()


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, ApiError), (403, ApiError), (404, NotFoundError), (409, ConflictError), (410, ApiError),
        (422, ApiError), (401, ClusterBusyError), (408, ClusterBusyError), (429, ClusterBusyError),
        (500, ClusterBusyError), (503, ClusterBusyError),
    ],
)  # fmt: skip
async def test_what_passes_by_itself_is_told_from_what_does_not(api: Api, status: int, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=str(status)) as refusal:
        await api.request("GET", f"/{status}")
    assert type(refusal.value) is kind


async def test_an_overloaded_api_server_is_left_alone_as_long_as_it_asks(api: Api) -> None:
    with pytest.raises(ClusterBusyError):
        await api.request("GET", "/429")
    start = time.monotonic()
    assert await api.request("GET", "/200") == {"reason": "Any"}
    assert time.monotonic() - start > 0.9


async def test_a_refused_token_is_read_anew(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []

    async def read() -> None:
        reads.append("read")

    monkeypatch.setattr(api, "_renew_credentials", read)
    with pytest.raises(ClusterBusyError):
        await api.request("GET", "/401")
    assert await api.request("GET", "/200") == {"reason": "Any"}
    assert reads == ["read"]
