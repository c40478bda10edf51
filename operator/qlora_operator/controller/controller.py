"""The parts of a running operator, put together: queue, reports, proof of the watch, resync, progress server."""

import asyncio
import logging
import random
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Final

from aiohttp import web

from qlora_api.job_ref import JobRef
from qlora_api.logs import fields, log_with
from qlora_operator.cluster.cache import Children, Shelf, Told
from qlora_operator.cluster.http import Api, ApiError, NotFoundError
from qlora_operator.cluster.interface import ClusterBusyError
from qlora_operator.cluster.kube_cluster import KubeCluster
from qlora_operator.cluster.parse import Child, Json
from qlora_operator.cluster.server_clock import utc_now
from qlora_operator.controller.metrics import Metrics
from qlora_operator.controller.reconcile import reconcile
from qlora_operator.controller.watch_health import WatchProof
from qlora_operator.controller.workqueue import WorkQueue
from qlora_operator.lifecycle import Watch, is_terminal
from qlora_operator.progress_server import Gate, ProgressEndpoint, Reports
from qlora_operator.settings import Settings

_log = logging.getLogger(__name__)

CRD_PATIENCE: Final = timedelta(seconds=30)
"""A release installs CRD and operator at once; the API server serves the CRD a moment later."""
DRAIN: Final = timedelta(seconds=8)
"""From SIGTERM to the end of the work at hand."""
STUCK_SECONDS: Final = 300.0
"""A pass takes seconds; one that takes or waits this long will never end."""


class Runtime:
    """One operator in one event loop."""

    def __init__(self, settings: Settings, api: Api, metrics: Metrics, clock: Callable[[], datetime] = utc_now) -> None:
        self.settings = settings
        self.metrics = metrics
        self.watch = WatchProof(asyncio.get_running_loop().time)
        self.queue: WorkQueue[JobRef] = WorkQueue(self._reconcile, settings.workers)
        metrics.watch_queue(lambda: self.queue.depth, self.queue.oldest_age)
        self._api = api
        self.children = Children()
        self._cluster = KubeCluster(api, self.children)
        self._clock = clock
        self._told = Told()
        self._reports = Reports()
        self._written: dict[JobRef, str] = {}
        self._listening_since: datetime | None = None
        self._resync: asyncio.Task[None] | None = None
        self._server: web.AppRunner | None = None

    async def start(self) -> None:
        """Wait for the CRD, look at every child, then start everything."""
        await self._wait_for_crd()
        await self._cluster.refresh(self.settings.namespaces)
        self.metrics.jobs.lead(self._reports.get)
        self.queue.start()
        self._resync = asyncio.create_task(self._resync_forever(), name="resync")
        self._server = await self._serve()
        self._listening_since = self._clock()

    async def stop(self) -> None:
        """Take no more reports and keys, finish the work at hand, and leave."""
        if self._resync is not None:
            self._resync.cancel()
        if self._server is not None:
            await self._server.cleanup()
        await self.queue.drain(DRAIN)
        await self._api.close()

    def ailment(self) -> str | None:
        """Say what only a restart can cure; a replica that waits to lead is well."""
        if self._server is None:
            return None
        if not self.queue.alive() or self._resync is None or self._resync.done():
            return "a worker has ended"
        if overdue := self.watch.overdue():
            return f"the watch is dead: no event for {overdue[0]}, and {len(overdue) - 1} more"
        age = self.queue.oldest_age()
        return f"work is stuck for {age:.0f} seconds" if age > STUCK_SECONDS else None

    def saw(self, ref: JobRef, item: Json) -> None:
        """An event of a QLoRAJob arrived; our own write needs no second look."""
        version = item["metadata"]["resourceVersion"]
        self.watch.saw(ref, version)
        if self._written.get(ref) != version:
            self._told.saw(ref, item)
            self.queue.add(ref)

    def saw_child(self, shelf: Shelf[Child], change: str | None, item: Json) -> None:
        """An event of a Job or a pod arrived; what tells nothing new needs no look."""
        ref = shelf.drop(item) if change == "DELETED" else shelf.put(item)
        if ref is not None:
            self.queue.add(ref)

    def forget(self, ref: JobRef) -> None:
        """A QLoRAJob is gone."""
        self._written.pop(ref, None)
        self._told.forget(ref)
        self.watch.forget(ref)
        self.metrics.jobs.saw(ref, None)
        self._reports.forget(ref)

    async def _reconcile(self, ref: JobRef) -> timedelta | None:
        log_with(namespace=ref.namespace, job=ref.name)
        with self.metrics.measure():
            watch = Watch(self._clock().replace(microsecond=0), self._reports.get(ref), self._listening_since)
            told = self._told.take(ref)
            if told is not None and self.watch.knows_newer(ref, told.resource_version):
                told = None
            outcome = await reconcile(ref, self._cluster, self.settings.installation, watch, told)
        self.metrics.passed(ref, outcome)
        if outcome.written is not None and outcome.status is not None:
            self._written[ref] = outcome.written
            self.watch.expect(ref, outcome.written)
            summary = fields(phase=outcome.status.phase, reason=outcome.status.reason, attempt=outcome.status.attempt)
            _log.info("%s: %s", outcome.status.reason, outcome.status.message, extra=summary)
        if outcome.status is not None and is_terminal(outcome.status):
            self._reports.forget(ref)
        return outcome.requeue

    async def _wait_for_crd(self) -> None:
        """An operator that starts before its CRD would watch nothing, and look healthy."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + CRD_PATIENCE.total_seconds()
        while True:
            try:
                await self._cluster.reach(self.settings.namespaces)
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
        for ref in await self._cluster.refresh(self.settings.namespaces):
            self.queue.add(ref)
        for job in await self._cluster.list_jobs(self.settings.namespaces):
            self.watch.expect(job.ref, job.resource_version)
            if not job.settled:
                self.queue.add(job.ref)

    async def _serve(self) -> web.AppRunner:
        gate = Gate(self._cluster, asyncio.get_running_loop().time)
        app = ProgressEndpoint(gate, self._reports, self.queue.add_after, self._clock).application()
        runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=1)
        await runner.setup()
        await web.TCPSite(runner, port=self.settings.progress_port).start()
        return runner
