"""What the kubelet's probe and Prometheus are answered, from the first moment of the process to its last."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from qlora_api.metrics import PATH


@asynccontextmanager
async def serve_health(
    port: int, unhealthy_reason: Callable[[], str | None], render: Callable[[], bytes]
) -> AsyncIterator[None]:
    """Answer /healthz with 200, or with 500 and the ailment, and /metrics, while the block runs."""

    async def answer(_: web.Request) -> web.Response:
        illness = unhealthy_reason()
        return web.Response(text=illness or "ok", status=500 if illness else 200)

    async def answer_metrics(_: web.Request) -> web.Response:
        return web.Response(body=render(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    app = web.Application()
    app.router.add_get("/healthz", answer)
    app.router.add_get(PATH, answer_metrics)
    runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=1)
    await runner.setup()
    try:
        await web.TCPSite(runner, port=port).start()
        yield
    finally:
        await runner.cleanup()
