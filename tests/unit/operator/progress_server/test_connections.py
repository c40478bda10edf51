"""Connections of the progress server: slow, many, large and compressed ones."""

import asyncio
import gzip
import logging
from collections.abc import AsyncIterator
from typing import Final

import pytest
from aiohttp import web

from qlora_operator.progress_server import ProgressServer, connections
from qlora_operator.progress_server.endpoint import close_connection

REQUEST: Final = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"


@pytest.fixture
async def bodies() -> list[bytes]:
    """The bodies that were read."""
    return []


@pytest.fixture
async def server(bodies: list[bytes]) -> AsyncIterator[ProgressServer]:
    async def answer(request: web.Request) -> web.Response:
        bodies.append(await request.read())
        return web.Response(text="ok")

    app = web.Application(middlewares=[close_connection])
    app.router.add_route("*", "/", answer)
    server = ProgressServer(app, 0)
    await server.start()
    yield server
    await server.cleanup()


async def send(server: ProgressServer, data: bytes) -> bytes:
    """Send a request, and return everything until the server closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        writer.write(data)
        return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()


async def test_one_request_per_connection(server: ProgressServer, bodies: list[bytes]) -> None:
    answer = await send(server, REQUEST * 3)
    assert answer.count(b"HTTP/1.1 200 OK") == len(bodies) == 1


async def test_unknown_path_closes_the_connection_too(server: ProgressServer) -> None:
    assert b"404" in await send(server, REQUEST.replace(b"/ ", b"/unknown "))


@pytest.mark.parametrize(
    "start",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"GET / HT", id="half-a-line"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: a\r\nX: ", id="half-the-headers"),
        pytest.param(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{", id="half-a-body"),
        pytest.param(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n", id="half-a-chunk"),
    ],
)
async def test_slow_client_is_cut_off(
    server: ProgressServer, start: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(connections, "CONNECTION_SECONDS", 0.05)
    async with asyncio.timeout(60):
        assert b"200" not in await send(server, start)
    assert [record for record in caplog.records if record.levelno >= logging.INFO] == []


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", id="tls"),
        pytest.param(b"GET / HTTP/9.9\r\n\r\n", id="unknown-version"),
        pytest.param(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n", id="negative-length"),
        pytest.param(
            b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", id="two-lengths"
        ),
        pytest.param(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", id="no-chunk-size"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 9_000 + b"\r\n\r\n", id="long-header"),
        pytest.param(b"GET /" + b"x" * 9_000 + b" HTTP/1.1\r\n\r\n", id="long-path"),
        pytest.param(b"GET /%ff%00/../.. HTTP/1.1\r\nHost: a\r\n\r\n", id="strange-path"),
        pytest.param(b"GET http://[ HTTP/1.1\r\nHost: a\r\n\r\n", id="broken-url"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: a\r\nX\x00: 1\r\n\r\n", id="nul-in-a-header"),
    ],
)
async def test_malformed_request_is_answered_without_a_log_line(
    server: ProgressServer, data: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(connections, "CONNECTION_SECONDS", 0.2)
    async with asyncio.timeout(60):
        answer = await send(server, data)
    assert b" 200 " not in answer
    assert b" 500 " not in answer
    assert [record for record in caplog.records if record.levelno >= logging.INFO] == []


async def test_error_of_the_operator_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def fail(_: web.Request) -> web.Response:
        raise RuntimeError("a bug")

    app = web.Application(middlewares=[close_connection])
    app.router.add_get("/", fail)
    server = ProgressServer(app, 0)
    await server.start()
    assert b" 500 " in await send(server, REQUEST)
    assert "a bug" in caplog.text
    await server.cleanup()


async def test_endless_headers_are_cut_off(server: ProgressServer, bodies: list[bytes]) -> None:
    headers = b"".join(b"X-%d: %s\r\n" % (number, b"x" * 8_000) for number in range(100))
    async with asyncio.timeout(60):
        assert b"200" not in await send(server, REQUEST[:-2] + headers)
    assert bodies == []


async def test_endless_body_is_cut_off(server: ProgressServer, bodies: list[bytes]) -> None:
    size = 2 * connections.MAX_REQUEST
    async with asyncio.timeout(60):
        await send(server, b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % size + b" " * size)
    assert bodies == []


async def test_compressed_body_is_not_expanded(server: ProgressServer, bodies: list[bytes]) -> None:
    bomb = gzip.compress(b" " * 50_000_000)
    head = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(bomb)
    await send(server, head + bomb)
    assert bodies == [bomb]


async def test_connections_of_one_address_are_bounded(
    server: ProgressServer, bodies: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "MAX_CONNECTIONS_PER_ADDRESS", 3)
    idle = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(3)]
    assert await send(server, REQUEST) == b""
    for _, writer in idle:
        writer.close()
        await writer.wait_closed()
    while bodies == []:
        await asyncio.sleep(0.01)
        await send(server, REQUEST)
    assert server.alive()


async def test_open_connections_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 2)
    monkeypatch.setattr(connections, "CONNECTION_SECONDS", 1.0)
    server = ProgressServer(web.Application(), 0)
    await server.start()
    idle = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(2)]
    async with asyncio.timeout(60):
        assert b"404" in await send(server, REQUEST), "it waits in the backlog until one is cut off"
    for _, writer in idle:
        writer.close()
    await server.cleanup()
    assert not server.alive()


async def test_connections_are_accepted_at_a_bounded_rate(
    server: ProgressServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "ACCEPTS_PER_SECOND", 50)
    loop = asyncio.get_running_loop()
    start = loop.time()
    await asyncio.gather(*(send(server, REQUEST) for _ in range(11)))
    assert loop.time() - start >= 10 / 50
