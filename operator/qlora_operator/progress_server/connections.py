"""Accepts the connections of the progress server: few at once, at a bounded rate, each for a few seconds.

The work queue runs in the same event loop, and must not notice a flood.
"""

import asyncio
import logging
import socket
from collections import Counter
from collections.abc import Callable
from typing import Final, cast

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.log import server_logger

from qlora_operator.progress_server.endpoint import MAX_BODY

MAX_CONNECTIONS: Final = 256
"""Open connections; more wait in the backlog of the socket."""
MAX_CONNECTIONS_PER_ADDRESS: Final = 32
"""Open connections of one address: a pod needs one, and the pods of a node may share its address."""
ACCEPTS_PER_SECOND: Final = 500
"""What 2,500 trainers need, each of which reports every 5 s; `benchmarks/progress_flood.py` shows what it costs."""
CONNECTION_SECONDS: Final = 10.0
"""Maximum age of a connection: a TokenReview takes at most 5 s, and the rest is for a slow network."""
MAX_REQUEST: Final = 2 * MAX_BODY
"""Bytes that are read from one connection: the body, the headers, and what chunked encoding adds."""
BACKLOG: Final = 128
ACCEPT_RETRY_SECONDS: Final = 1.0
"""Pause after an error of accept(), such as too many open files; asyncio's own server takes the same."""

_log = logging.getLogger(__name__)


def is_not_of_client(record: logging.LogRecord) -> bool:
    """Return whether a log record is about an error of this process, not of a client that anybody can run."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, (ConnectionError, HttpProcessingError, web.RequestPayloadError))


server_logger.addFilter(is_not_of_client)


class BoundedConnection(asyncio.Protocol):
    """Passes a connection to the HTTP protocol, and aborts it when it is too old or sends too much."""

    def __init__(self, http: asyncio.Protocol, on_close: Callable[[], None]) -> None:
        self._http = http
        self._on_close = on_close
        self._received = 0
        self._transport: asyncio.Transport | None = None
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start the deadline."""
        self._transport = cast("asyncio.Transport", transport)
        self._deadline = asyncio.get_running_loop().call_later(CONNECTION_SECONDS, self._transport.abort)
        self._http.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        """Pass the data on, up to the limit."""
        self._received += len(data)
        if self._received <= MAX_REQUEST:
            self._http.data_received(data)
        elif self._transport is not None:
            self._transport.abort()

    def eof_received(self) -> bool | None:
        """Pass the end of the request on."""
        return self._http.eof_received()

    def pause_writing(self) -> None:
        """Pass the back-pressure on."""
        self._http.pause_writing()

    def resume_writing(self) -> None:
        """Pass the end of the back-pressure on."""
        self._http.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the deadline, and make room for another connection."""
        if self._deadline is not None:
            self._deadline.cancel()
        self._http.connection_lost(exc)
        self._on_close()


class ProgressServer:
    """Serves the progress endpoint on a port."""

    def __init__(self, app: web.Application, port: int) -> None:
        # Compressed bodies are refused as invalid JSON: a small one can expand to gigabytes.
        self._runner = web.AppRunner(
            app, access_log=None, handle_signals=False, shutdown_timeout=1, auto_decompress=False
        )
        self._port = port
        self._free = asyncio.Semaphore(MAX_CONNECTIONS)
        self._by_address: Counter[str] = Counter()
        self._socket: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        """Port that it listens on."""
        return int(self._socket.getsockname()[1]) if self._socket else self._port

    async def start(self) -> None:
        """Listen on all addresses."""
        await self._runner.setup()
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        self._socket = socket.create_server(("", self._port), family=family, backlog=BACKLOG, dualstack_ipv6=dual)
        self._socket.setblocking(False)
        self._accepting = asyncio.create_task(self._accept_forever(self._socket), name="progress server")

    def alive(self) -> bool:
        """Return whether it accepts connections."""
        return self._accepting is not None and not self._accepting.done()

    async def cleanup(self) -> None:
        """Stop listening, let requests in progress finish for a second, and close the connections."""
        if self._accepting is not None:
            self._accepting.cancel()
            await asyncio.gather(self._accepting, return_exceptions=True)
        if self._socket is not None:
            self._socket.close()
        await self._runner.cleanup()

    async def _accept_forever(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._free.acquire()
            try:
                connection, address = await loop.sock_accept(listener)
            except OSError as error:
                self._free.release()
                _log.warning("cannot accept a connection for progress reports: %s", error)
                await asyncio.sleep(ACCEPT_RETRY_SECONDS)
                continue
            await self._open(connection, str(address[0]))
            await asyncio.sleep(1 / ACCEPTS_PER_SECOND)

    async def _open(self, connection: socket.socket, address: str) -> None:
        """Serve a connection, unless its address has too many."""
        if self._by_address[address] >= MAX_CONNECTIONS_PER_ADDRESS or self._runner.server is None:
            connection.close()
            self._free.release()
            return
        self._by_address[address] += 1
        protocol = BoundedConnection(self._runner.server(), lambda: self._on_close(address))
        await asyncio.get_running_loop().connect_accepted_socket(lambda: protocol, connection)

    def _on_close(self, address: str) -> None:
        self._free.release()
        self._by_address[address] -= 1
        if not self._by_address[address]:
            del self._by_address[address]
