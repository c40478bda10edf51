"""Serves /healthz for the kubelet and /metrics for Prometheus, as long as the process runs."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from qlora_api.metrics import PATH


@asynccontextmanager
async def serve_health(
    port: int, unhealthy_reason: Callable[[], str | None], render: Callable[[], bytes]
) -> AsyncIterator[None]:
    """Serve /healthz (200, or 500 with the reason) and /metrics while the block runs."""

    async def get_health(_: web.Request) -> web.Response:
        reason = unhealthy_reason()
        return web.Response(text=reason or "ok", status=500 if reason else 200)

    async def get_metrics(_: web.Request) -> web.Response:
        return web.Response(body=render(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    app = web.Application()
    app.router.add_get("/healthz", get_health)
    app.router.add_get(PATH, get_metrics)
    runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=1)
    await runner.setup()
    try:
        await web.TCPSite(runner, port=port).start()
        yield
    finally:
        await runner.cleanup()
