"""The parts of a running operator, put together: queue, reports, proof of the watch, resync, progress server."""

import asyncio
import logging
import random
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Final

from aiohttp import web

from qlora_api.job_ref import JobRef
from qlora_api.logs import bind_task_fields, log_fields
from qlora_operator.cluster.cache import ChildCache, JobCache, ObjectCache
from qlora_operator.cluster.http import Api, ApiError, NotFoundError
from qlora_operator.cluster.interface import ClusterBusyError
from qlora_operator.cluster.kube_cluster import KubeCluster
from qlora_operator.cluster.parse import Child, Json
from qlora_operator.cluster.server_clock import utc_now
from qlora_operator.controller.metrics import Metrics
from qlora_operator.controller.reconcile import reconcile
from qlora_operator.controller.watch_health import WatchHealth
from qlora_operator.controller.workqueue import WorkQueue
from qlora_operator.lifecycle import ReconcileContext, is_terminal
from qlora_operator.progress_server import PodAuthorizer, ProgressEndpoint, ReportStore
from qlora_operator.settings import Settings

_log = logging.getLogger(__name__)

CRD_TIMEOUT: Final = timedelta(seconds=30)
"""A release installs CRD and operator at once; the API server serves the CRD a moment later."""
DRAIN_TIMEOUT: Final = timedelta(seconds=8)
"""From SIGTERM to the end of the work at hand."""
STUCK_SECONDS: Final = 300.0
"""A pass takes seconds; one that takes or waits this long will never end."""


class Controller:
    """One operator in one event loop."""

    def __init__(self, settings: Settings, api: Api, metrics: Metrics, clock: Callable[[], datetime] = utc_now) -> None:
        self.settings = settings
        self.metrics = metrics
        self.watch_health = WatchHealth(asyncio.get_running_loop().time)
        self.queue: WorkQueue[JobRef] = WorkQueue(self._reconcile, settings.workers)
        metrics.track_queue(lambda: self.queue.depth, self.queue.oldest_age)
        self._api = api
        self.child_cache = ChildCache()
        self._cluster = KubeCluster(api, self.child_cache)
        self._clock = clock
        self._job_cache = JobCache()
        self._reports = ReportStore()
        self._written_versions: dict[JobRef, str] = {}
        self._reports_since: datetime | None = None
        self._resync: asyncio.Task[None] | None = None
        self._server: web.AppRunner | None = None

    async def start(self) -> None:
        """Wait for the CRD, look at every child, then start everything."""
        await self._wait_for_crd()
        await self._cluster.relist(self.settings.namespaces)
        self.metrics.jobs.start_leading(self._reports.get)
        self.queue.start()
        self._resync = asyncio.create_task(self._resync_forever(), name="resync")
        self._server = await self._start_progress_server()
        self._reports_since = self._clock()

    async def stop(self) -> None:
        """Take no more reports and keys, finish the work at hand, and leave."""
        if self._resync is not None:
            self._resync.cancel()
        if self._server is not None:
            await self._server.cleanup()
        await self.queue.drain(DRAIN_TIMEOUT)
        await self._api.close()

    def unhealthy_reason(self) -> str | None:
        """Say what only a restart can cure; a replica that waits to lead is well."""
        if self._server is None:
            return None
        if not self.queue.alive() or self._resync is None or self._resync.done():
            return "a worker has ended"
        if overdue := self.watch_health.overdue():
            return f"the watch is dead: no event for {overdue[0]}, and {len(overdue) - 1} more"
        age = self.queue.oldest_age()
        return f"work is stuck for {age:.0f} seconds" if age > STUCK_SECONDS else None

    def on_job_update(self, ref: JobRef, item: Json) -> None:
        """An event of a QLoRAJob arrived; our own write needs no second look."""
        version = item["metadata"]["resourceVersion"]
        self.watch_health.on_event(ref, version)
        if self._written_versions.get(ref) != version:
            self._job_cache.on_update(ref, item)
            self.queue.add(ref)

    def on_child_event(self, cache: ObjectCache[Child], change: str | None, item: Json) -> None:
        """An event of a Job or a pod arrived; what tells nothing new needs no look."""
        ref = cache.delete(item) if change == "DELETED" else cache.update(item)
        if ref is not None:
            self.queue.add(ref)

    def on_job_delete(self, ref: JobRef) -> None:
        """A QLoRAJob is gone."""
        self._written_versions.pop(ref, None)
        self._job_cache.forget(ref)
        self.watch_health.forget(ref)
        self.metrics.jobs.set_phase(ref, None)
        self._reports.forget(ref)

    async def _reconcile(self, ref: JobRef) -> timedelta | None:
        bind_task_fields(namespace=ref.namespace, job=ref.name)
        with self.metrics.time_reconcile():
            watch = ReconcileContext(self._clock().replace(microsecond=0), self._reports.get(ref), self._reports_since)
            told = self._job_cache.pop(ref)
            if told is not None and self.watch_health.has_newer_version(ref, told.resource_version):
                told = None
            outcome = await reconcile(ref, self._cluster, self.settings.installation, watch, told)
        self.metrics.on_reconciled(ref, outcome)
        if outcome.written_version is not None and outcome.status is not None:
            self._written_versions[ref] = outcome.written_version
            self.watch_health.expect_version(ref, outcome.written_version)
            summary = log_fields(
                phase=outcome.status.phase, reason=outcome.status.reason, attempt=outcome.status.attempt
            )
            _log.info("%s: %s", outcome.status.reason, outcome.status.message, extra=summary)
        if outcome.status is not None and is_terminal(outcome.status):
            self._reports.forget(ref)
        return outcome.requeue_after

    async def _wait_for_crd(self) -> None:
        """An operator that starts before its CRD would watch nothing, and look healthy."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + CRD_TIMEOUT.total_seconds()
        while True:
            try:
                await self._cluster.check_api_served(self.settings.namespaces)
            except (ClusterBusyError, NotFoundError) as error:
                if loop.time() > deadline:
                    raise
                _log.info("waiting for the QLoRAJob API: %s", error)
                await asyncio.sleep(1)
            else:
                return

    async def _resync_forever(self) -> None:
        while True:
            await asyncio.sleep(self.settings.resync.total_seconds() * random.uniform(0.9, 1.1))  # noqa: S311 (no secret)
            try:
                await self.resync()
            except (ClusterBusyError, ApiError) as error:
                _log.warning("the resync has to wait: %s", error)

    async def resync(self) -> None:
        """Look at every unfinished job again, at all children, and at whether the watches told of them."""
        for ref in await self._cluster.relist(self.settings.namespaces):
            self.queue.add(ref)
        for job in await self._cluster.list_jobs(self.settings.namespaces):
            self.watch_health.expect_version(job.ref, job.resource_version)
            if not job.fully_reconciled:
                self.queue.add(job.ref)

    async def _start_progress_server(self) -> web.AppRunner:
        gate = PodAuthorizer(self._cluster, asyncio.get_running_loop().time)
        app = ProgressEndpoint(gate, self._reports, self.queue.add_after, self._clock).application()
        runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=1)
        await runner.setup()
        await web.TCPSite(runner, port=self.settings.progress_port).start()
        return runner
