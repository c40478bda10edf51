"""A proxy between operator and API server that injects faults.

It speaks HTTP to the operator and TLS to the API server, and forwards the operator's token. Watch events are forwarded
one by one as they arrive.
"""

import asyncio
import ssl
import threading
import time
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import aiohttp
import yaml
from aiohttp import web

from qlora_api import names
from tests.cluster.cluster import Cluster
from tests.cluster.host.addresses import free_ports
from tests.cluster.services.pki import decode

MUTATING: Final = frozenset({"POST", "PUT", "PATCH", "DELETE"})
_NOT_COUNTED: Final = ("/tokenreviews", "/leases")
"""Queries that use POST, and periodic renewals."""
CLOSING: Final = 0.25
"""Seconds in which the loop closes the sockets of aborted connections, as aiohttp's documentation recommends."""
_KEPT_HEADERS: Final = ("Authorization", "Accept", "Content-Type")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Call:
    """One request of the operator."""

    method: str
    path: str
    query: dict[str, str]
    body: bytes
    token: str = ""

    @property
    def is_watch(self) -> bool:
        """Return whether the response is a stream of events."""
        return self.query.get("watch", "") in {"true", "1"}

    @property
    def is_write(self) -> bool:
        """Return whether it changes cluster state."""
        return self.method in MUTATING and not any(part in self.path for part in _NOT_COUNTED)

    @property
    def namespace(self) -> str:
        """Return the namespace; empty if there is none."""
        return self.path.partition("/namespaces/")[2].partition("/")[0]

    @property
    def of_qlorajobs(self) -> bool:
        """Return whether it concerns QLoRAJobs, not their children."""
        return f"/apis/{names.GROUP}/" in self.path


@dataclass(frozen=True)
class Event:
    """One watch event as the API server sent it."""

    call: Call
    line: bytes
    received_at: float
    """Monotonic time in seconds."""


class ConnectionDropped(Exception):  # noqa: N818 (nothing is wrong with the proxy)
    """Drop the connection without a response."""


class Fault:
    """No fault; subclasses override what they need."""

    refuses_watches = False
    """Whether it ends watches so that the operator restarts; the log then has tracebacks."""

    async def before(self, call: Call) -> web.Response | None:  # noqa: ARG002 (for those who override it)
        """Intercept a request; a response keeps it from the API server."""
        return None

    async def after(self, call: Call, status: int) -> None:
        """Observe a response before the operator gets it."""

    async def finish(self) -> None:
        """Wait for unfinished work of the fault after the scenario."""

    async def deliver(self, event: Event) -> AsyncIterator[bytes]:
        """Yield what the operator receives for a watch event."""
        yield event.line


@dataclass(frozen=True)
class Upstream:
    """The API server and its CA."""

    server: str
    trust: ssl.SSLContext

    @classmethod
    def of(cls, cluster: Cluster) -> "Upstream":
        """Read both from a cluster's kubeconfig."""
        entry = yaml.safe_load(cluster.kubeconfig.read_text())["clusters"][0]["cluster"]
        authority = decode(entry["certificate-authority-data"])
        return cls(entry["server"], ssl.create_default_context(cadata=authority))


@dataclass
class Proxy:
    """Runs in a thread of its own, from start() to stop()."""

    upstream: Upstream
    fault: Fault = field(default_factory=Fault)
    port: int = field(default_factory=lambda: free_ports(1)[0])
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)

    @property
    def server(self) -> str:
        """The URL for the operator's kubeconfig."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> "Proxy":
        """Listen."""
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self.run(self._open())
        return self

    def stop(self) -> None:
        """Close all connections, and stop the thread."""
        self.run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Run a coroutine in the proxy's thread, and wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=60)

    async def _open(self) -> None:
        connector = aiohttp.TCPConnector(ssl=self.upstream.trust, limit=0)
        self._session = aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(None))
        app = web.Application(client_max_size=1 << 24)
        app.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()

    async def _close(self) -> None:
        await self._runner.cleanup()
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)
        await self._session.close()
        await asyncio.sleep(CLOSING)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        call = Call(request.method, request.path, dict(request.query), await request.read(), _token(request))
        try:
            answer = await self.fault.before(call)
            if answer is not None:
                return answer
            return await (self._stream(request, call) if call.is_watch else self._forward(request, call))
        except ConnectionDropped:
            if request.transport is not None:
                request.transport.abort()
            return web.Response()

    async def _forward(self, request: web.Request, call: Call) -> web.Response:
        async with self._ask(request, call) as answer:
            body = await answer.read()
        await self.fault.after(call, answer.status)
        return web.Response(body=body, status=answer.status, content_type=answer.content_type)

    def _ask(self, request: web.Request, call: Call) -> Any:
        headers = {name: request.headers[name] for name in _KEPT_HEADERS if name in request.headers}
        url = f"{self.upstream.server}{request.path_qs}"
        return self._session.request(call.method, url, data=call.body or None, headers=headers)

    async def _stream(self, request: web.Request, call: Call) -> web.StreamResponse:
        response = web.StreamResponse()
        async with self._ask(request, call) as answer:
            response.set_status(answer.status)
            response.content_type = answer.content_type
            await response.prepare(request)
            async for line, came_at in _lines(answer.content):
                async for line_out in self.fault.deliver(Event(call, line, came_at)):
                    await response.write(line_out)
        return response


def _token(request: web.Request) -> str:
    return request.headers.get("Authorization", "").rpartition(" ")[2]


async def _lines(content: aiohttp.StreamReader) -> AsyncIterator[tuple[bytes, float]]:
    """Yield each line with its arrival time, even if the reader is slow."""
    queue: asyncio.Queue[tuple[bytes, float] | None] = asyncio.Queue()
    reader = asyncio.create_task(_read(content, queue))
    try:
        while (entry := await queue.get()) is not None:
            yield entry
    finally:
        reader.cancel()


async def _read(content: aiohttp.StreamReader, queue: asyncio.Queue[tuple[bytes, float] | None]) -> None:
    rest = b""
    try:
        async for chunk in content.iter_any():
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                queue.put_nowait((line + b"\n", time.monotonic()))
    finally:
        queue.put_nowait(None)
