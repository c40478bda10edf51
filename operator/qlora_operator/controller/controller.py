"""Assembles a running operator: work queue, caches, progress reports, watch health, resync and progress server."""

import asyncio
import logging
import random
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Final

from qlora_api.job_ref import JobRef
from qlora_api.logs.formatters import bind_task_fields, log_fields
from qlora_operator.cluster.cache import ChildCache, JobCache, ObjectCache
from qlora_operator.cluster.http import Api, ApiError, NotFoundError
from qlora_operator.cluster.interface import ClusterBusyError
from qlora_operator.cluster.kube_cluster import KubeCluster
from qlora_operator.cluster.parse import Child, Json
from qlora_operator.cluster.server_clock import utc_now
from qlora_operator.controller.metrics import RUNNING, Metrics
from qlora_operator.controller.node_failures import NodeFailures
from qlora_operator.controller.reconcile import ReconcileResult, reconcile
from qlora_operator.controller.watch_health import WatchHealth
from qlora_operator.controller.workqueue import WorkQueue
from qlora_operator.lifecycle import Reception, ReconcileContext, is_terminal
from qlora_operator.progress_server import PodAuthorizer, ProgressEndpoint, ProgressServer, ReportStore
from qlora_operator.resources import Owner, build_quarantine_event
from qlora_operator.settings import Settings

_log = logging.getLogger(__name__)

CRD_TIMEOUT: Final = timedelta(seconds=30)
"""Helm installs CRD and operator together, and the API server serves a new CRD only a moment later."""
DRAIN_TIMEOUT: Final = timedelta(seconds=8)
"""Grace period for reconciles in progress after SIGTERM."""
STUCK_SECONDS: Final = 300.0
"""A reconcile takes seconds; one that runs or waits this long will never finish."""


class Controller:
    """One operator in one event loop."""

    def __init__(
        self,
        settings: Settings,
        api: Api,
        metrics: Metrics,
        clock: Callable[[], datetime] = utc_now,
        review_api: Api | None = None,
    ) -> None:
        self.settings = settings
        self.metrics = metrics
        self.watch_health = WatchHealth(asyncio.get_running_loop().time)
        self.queue: WorkQueue[JobRef] = WorkQueue(self._reconcile, settings.workers)
        metrics.track_queue(lambda: self.queue.depth, self.queue.oldest_age)
        self._api = api
        self.child_cache = ChildCache()
        self._cluster = KubeCluster(api, self.child_cache)
        self._review_api = review_api or api
        self._authorizer = PodAuthorizer(
            KubeCluster(self._review_api, self.child_cache), asyncio.get_running_loop().time, clock
        )
        self._clock = clock
        self._job_cache = JobCache()
        self._reports = ReportStore()
        self._node_failures = NodeFailures()
        metrics.track_quarantine(lambda: len(self._node_failures.quarantined(self._clock())))
        self._written_versions: dict[JobRef, str] = {}
        self._reports_since: datetime | None = None
        self._resync: asyncio.Task[None] | None = None
        self._server: ProgressServer | None = None

    async def start(self) -> None:
        """Wait for the CRD, fill the child cache, then start the queue, the resync and the progress server."""
        await self._wait_for_crd()
        await self._cluster.relist(self.settings.namespaces)
        self.metrics.jobs.start_leading(self._reports.get)
        self.queue.start()
        self._resync = asyncio.create_task(self._resync_forever(), name="resync")
        self._server = await self._start_progress_server()
        self._reports_since = self._clock()

    async def stop(self) -> None:
        """Stop accepting reports and keys, let reconciles in progress finish, and close the API connections."""
        if self._resync is not None:
            self._resync.cancel()
        if self._server is not None:
            await self._server.cleanup()
        await self.queue.drain(DRAIN_TIMEOUT)
        await self._review_api.close()
        await self._api.close()

    def unhealthy_reason(self) -> str | None:
        """Return a fault that only a restart can fix, or None; a standby replica is healthy."""
        if self._server is None:
            return None
        if not self.queue.alive() or self._resync is None or self._resync.done():
            return "a worker has stopped"
        if not self._server.alive():
            return "the progress server has stopped"
        if overdue := self.watch_health.overdue():
            return f"the watch is stalled: no event for {overdue[0]} and {len(overdue) - 1} more"
        age = self.queue.oldest_age()
        return f"the work queue is stuck for {age:.0f} seconds" if age > STUCK_SECONDS else None

    def on_job_update(self, ref: JobRef, item: Json) -> None:
        """Queue a QLoRAJob that changed; the event of the operator's own status write is skipped."""
        version = item["metadata"]["resourceVersion"]
        self.watch_health.on_event(ref, version)
        if self._written_versions.get(ref) != version:
            self._job_cache.on_update(ref, item)
            self.queue.add(ref)

    def on_child_event(self, cache: ObjectCache[Child], change: str | None, item: Json) -> None:
        """Queue the QLoRAJob of a Job or pod, if the event changed the cached object."""
        ref = cache.delete(item) if change == "DELETED" else cache.update(item)
        if ref is not None:
            self.queue.add(ref)

    def on_job_delete(self, ref: JobRef) -> None:
        """Drop all state of a deleted QLoRAJob."""
        self._written_versions.pop(ref, None)
        self._job_cache.forget(ref)
        self.watch_health.forget(ref)
        self.metrics.jobs.set_phase(ref, None)
        self._reports.forget(ref)
        self._authorizer.on_job_delete(ref)

    async def _reconcile(self, ref: JobRef) -> timedelta | None:
        bind_task_fields(namespace=ref.namespace, job=ref.name)
        with self.metrics.time_reconcile():
            context = self._make_context(ref)
            cached = self._job_cache.pop(ref)
            if cached is not None and self.watch_health.has_newer_version(ref, cached.resource_version):
                cached = None
            result = await reconcile(ref, self._cluster, self.settings.installation, context, cached)
        self.metrics.on_reconciled(ref, result)
        if result.written_version is not None and result.status is not None:
            self._written_versions[ref] = result.written_version
            self.watch_health.expect_version(ref, result.written_version)
            summary = log_fields(phase=result.status.phase, reason=result.status.reason, attempt=result.status.attempt)
            _log.info("%s: %s", result.status.reason, result.status.message, extra=summary)
        if result.status is not None and is_terminal(result.status):
            self._reports.forget(ref)
        elif result.status is not None and result.status.phase not in RUNNING:
            self._reports.set_idle(ref)
        elif result.status is not None and result.status.last_report is not None:
            self._reports.expect(ref, result.status.last_report.updated_at)
        await self._update_node_failures(ref, result, context)
        return result.requeue_after

    def _make_context(self, ref: JobRef) -> ReconcileContext:
        now = self._clock().replace(microsecond=0)
        return ReconcileContext(
            now,
            self._reports.get(ref),
            self._reports_since,
            self._reports.job_uid(ref),
            self._node_failures.quarantined(now),
            Reception(self._reports.others(ref), self._reports.resumed_at(ref.namespace)),
        )

    async def _update_node_failures(self, ref: JobRef, result: ReconcileResult, context: ReconcileContext) -> None:
        """Take the attempts of a run into account, and record an Event for each node that is quarantined by them."""
        if result.status is None:
            return
        self._node_failures.update(ref, result.status.attempts)
        if result.request is None or result.written_version is None:
            return
        owner = Owner(ref, result.request.raw.uid)
        for node, until in self._node_failures.quarantined(context.now).items():
            if node not in context.quarantined_nodes:
                _log.warning("node %s is quarantined until %s", node, until, extra=log_fields(node=node))
                await self._cluster.record_event(build_quarantine_event(owner, node, until, context.now))

    async def _wait_for_crd(self) -> None:
        """Wait until the CRD is served: an operator that starts before it would watch nothing and appear healthy."""
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
                _log.warning("resync failed, will retry: %s", error)

    async def resync(self) -> None:
        """Relist children and QLoRAJobs; queue those that are unfinished or were stale in the cache."""
        for ref in await self._cluster.relist(self.settings.namespaces):
            self.queue.add(ref)
        for job in await self._cluster.list_jobs(self.settings.namespaces):
            self.watch_health.expect_version(job.ref, job.resource_version)
            if not job.fully_reconciled:
                self.queue.add(job.ref)

    async def _start_progress_server(self) -> ProgressServer:
        endpoint = ProgressEndpoint(self._authorizer, self._reports, self.queue.add_after, self._clock)
        server = ProgressServer(endpoint.application(), self.settings.progress_port)
        await server.start()
        return server
