"""A proxy between an operator and the API server: it sees every request, and does the harm that a test asks for.

It speaks HTTP to the operator and TLS to the API server, and passes the operator's own token on. Answers of watches
pass event by event, as they come.
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
from tests.cluster.addresses import free_ports
from tests.cluster.cluster import Cluster
from tests.cluster.pki import decode

MUTATING: Final = frozenset({"POST", "PUT", "PATCH", "DELETE"})
_NOT_COUNTED: Final = ("/tokenreviews", "/leases")
"""Questions that are asked by POST, and renewals that come with time."""
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
        """Whether the answer is a stream of events."""
        return self.query.get("watch", "") in {"true", "1"}

    @property
    def is_write(self) -> bool:
        """Whether it changes something that outlives the operator."""
        return self.method in MUTATING and not any(part in self.path for part in _NOT_COUNTED)

    @property
    def namespace(self) -> str:
        """The namespace, or nothing."""
        return self.path.partition("/namespaces/")[2].partition("/")[0]

    @property
    def of_qlorajobs(self) -> bool:
        """Whether it is about QLoRAJobs, and not their children."""
        return f"/apis/{names.GROUP}/" in self.path


@dataclass(frozen=True)
class Event:
    """One event of a watch, as the API server wrote it."""

    call: Call
    line: bytes
    received_at: float
    """By the monotonic clock."""


class ConnectionDropped(Exception):  # noqa: N818 (nothing is wrong with the proxy)
    """The connection ends here, without an answer."""


class Fault:
    """Does no harm; a test's own overrides what it needs."""

    refuses_watches = False
    """Whether it ends watches for good, and the operator with them; the log tells of each with a traceback."""

    async def before(self, call: Call) -> web.Response | None:  # noqa: ARG002 (for those who override it)
        """See a request before the API server does; an answer keeps it from there."""
        return None

    async def after(self, call: Call, status: int) -> None:
        """See that the API server has done it, before the operator learns that."""

    async def finish(self) -> None:
        """Wait for what the fault has still under way, when the story is over."""

    async def deliver(self, event: Event) -> AsyncIterator[bytes]:
        """Return what the operator is told of one event of a watch."""
        yield event.line


@dataclass(frozen=True)
class Upstream:
    """The API server, and the authority that signed for it."""

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
        """Hang up."""
        self.run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Do something in the proxy's thread, and wait for it."""
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
        await self._session.close()
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

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
                async for told in self.fault.deliver(Event(call, line, came_at)):
                    await response.write(told)
        return response


def _token(request: web.Request) -> str:
    return request.headers.get("Authorization", "").rpartition(" ")[2]


async def _lines(content: aiohttp.StreamReader) -> AsyncIterator[tuple[bytes, float]]:
    """Yield each line with the time at which it came, though whoever reads them is slow."""
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
