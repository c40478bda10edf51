"""What answers of an API server mean, by one that gives any answer."""

import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from itertools import pairwise

import pytest
from aiohttp import web
from kubernetes.aio import client

from qlora_operator.cluster.cache import ChildCache
from qlora_operator.cluster.http import (
    MAX_TRIES,
    Api,
    ApiError,
    ConflictError,
    FailedWebhookError,
    NotFoundError,
    Response,
    _parse_response,
)
from qlora_operator.cluster.interface import AdmissionDeniedError, ClusterBusyError
from qlora_operator.cluster.kube_cluster import KubeCluster


@pytest.fixture
def calls() -> list[float]:
    """When the API server was asked, in seconds."""
    return []


@pytest.fixture
async def api(calls: list[float]) -> AsyncIterator[Api]:
    """Answers /<status>, and /busy/<times> with 429 at first; it asks for a second."""

    async def answer(request: web.Request) -> web.Response:
        calls.append(time.monotonic())
        busy = len(calls) <= int(request.match_info.get("busy", 0))
        status = 429 if busy else int(request.match_info.get("status", 200))
        return web.json_response({"reason": "Any"}, status=status, headers={"Retry-After": "1"})

    app = web.Application()
    app.router.add_get("/{status}", answer)
    app.router.add_get("/busy/{busy}", answer)
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
async def test_status_code_maps_to_error_class(api: Api, status: int, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=str(status)) as refusal:
        await api.request("GET", f"/{status}")
    assert type(refusal.value) is kind


WEBHOOK = b'{"reason": "InternalError", "message": "Internal error occurred: failed calling webhook \\"x\\": timeout"}'


def test_webhook_that_does_not_answer_is_retried_like_a_busy_server() -> None:
    """The election, lists and statuses go on; who writes a child tells the run what is wrong."""
    with pytest.raises(ClusterBusyError, match="failed calling webhook") as refusal:
        _parse_response(Response(500, "", WEBHOOK))
    assert type(refusal.value) is FailedWebhookError


@pytest.mark.parametrize("write", ["ensure", "patch"])
async def test_child_that_a_webhook_keeps_from_being_written_is_denied_for_now(
    api: Api, monkeypatch: pytest.MonkeyPatch, write: str
) -> None:
    async def request(*_: object, **__: object) -> object:
        return _parse_response(Response(500, "", WEBHOOK))

    monkeypatch.setattr(api, "request", request)
    child = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"namespace": "ml", "name": "bot-1"}}
    with pytest.raises(AdmissionDeniedError, match="failed calling webhook") as refusal:
        await getattr(KubeCluster(api, ChildCache()), write)(child)
    assert not refusal.value.permanent


@pytest.mark.parametrize("busy", [1, MAX_TRIES - 1])
async def test_retry_after_is_honored(busy: int, api: Api, calls: list[float]) -> None:
    assert await api.request("GET", f"/busy/{busy}") == {"reason": "Any"}
    assert len(calls) == busy + 1
    assert all(later - earlier > 0.9 for earlier, later in pairwise(calls))


async def test_overload_beyond_max_tries_raises_cluster_busy(api: Api, calls: list[float]) -> None:
    with pytest.raises(ClusterBusyError, match="429"):
        await api.request("GET", "/429")
    assert len(calls) == MAX_TRIES
    assert await api.request("GET", "/200") == {"reason": "Any"}
    assert calls[-1] - calls[-2] > 0.9, "the last pause is kept by whoever calls next"


async def test_unauthorized_call_reads_credentials_again(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []

    async def read() -> None:
        reads.append("read")

    monkeypatch.setattr(api, "_renew_credentials", read)
    with pytest.raises(ClusterBusyError):
        await api.request("GET", "/401")
    assert await api.request("GET", "/200") == {"reason": "Any"}
    assert reads == ["read"]


async def test_only_dates_of_successful_responses_are_passed_on(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    dates: list[str] = []
    monkeypatch.setattr(api, "_on_server_date", lambda date, _: dates.append(date))
    await api.request("GET", "/200")
    for status in (404, 503):
        with pytest.raises((NotFoundError, ClusterBusyError)):
            await api.request("GET", f"/{status}")
    [heard] = [parsedate_to_datetime(date) for date in dates]
    assert abs(datetime.now(UTC) - heard) < timedelta(seconds=10)


@pytest.mark.parametrize("status", [200, 403])
@pytest.mark.parametrize("text", [b"<html>maintenance</html>", b"[]", b"null", b"", b"1" * 5000, b"[" * 100_000])
def test_answer_that_is_no_object_is_an_error(text: bytes, status: int) -> None:
    with pytest.raises(ClusterBusyError if status == 200 else ApiError):
        _parse_response(Response(status, "", text))
