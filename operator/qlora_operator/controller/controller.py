"""Assembles a running operator: work queue, caches, progress reports, watch health, resync and progress server."""

import asyncio
import logging
import random
from collections.abc import Callable, Collection, Iterator
from datetime import datetime, timedelta
from typing import Any, Final

from qlora_api import names
from qlora_api.job_ref import JobRef
from qlora_api.logs.formatters import bind_task_fields, log_fields
from qlora_api.names import RUNNING
from qlora_api.v1alpha1 import QLoRAJobStatus
from qlora_operator.cluster.cache import ChildCache, JobCache, ObjectCache, read_copy
from qlora_operator.cluster.http import Api, ApiError, NotFoundError
from qlora_operator.cluster.interface import ClusterBusyError
from qlora_operator.cluster.kube_cluster import KubeCluster
from qlora_operator.cluster.parse import Child, Json, parse_job
from qlora_operator.cluster.server_clock import utc_now
from qlora_operator.cluster.tolerant import parse_or_skip
from qlora_operator.controller.error_status import write_error
from qlora_operator.controller.installations import Installations
from qlora_operator.controller.metrics import Metrics
from qlora_operator.controller.node_failures import NodeFailures
from qlora_operator.controller.reconcile import reconcile
from qlora_operator.controller.result import ReconcileResult
from qlora_operator.controller.served_namespaces import LIST, ServedNamespaces
from qlora_operator.controller.watch_health import WatchHealth
from qlora_operator.controller.workqueue import WorkQueue
from qlora_operator.leader_election.installation_lease import KubeInstallationReader
from qlora_operator.lifecycle import Reception, ReconcileContext, is_terminal
from qlora_operator.lifecycle.context import NODE_FAILURES_LOAD
from qlora_operator.progress_server import PodAuthorizer, ProgressEndpoint, ProgressServer, ReportStore
from qlora_operator.resources import Owner, build_installation_event, build_quarantine_event, training_placement
from qlora_operator.settings import Settings

_log = logging.getLogger(__name__)

CRD_TIMEOUT: Final = timedelta(seconds=30)
"""Helm installs CRD and operator together, and the API server serves a new CRD only a moment later."""
DRAIN_TIMEOUT: Final = timedelta(seconds=8)
"""Grace period for reconciles in progress after SIGTERM."""
STUCK_SECONDS: Final = 300.0
"""A reconcile takes seconds; if none succeeds for this long although some are due, none ever will."""
STARTUP_SECONDS: Final = 300.0
"""Longest start-up: listing the children of ten thousand QLoRAJobs takes a minute from a slow API server."""
UNSERVED_SECONDS: Final = 600.0
"""As long may no namespace at all be served, the first lists of the watches included."""
FIRST_RETRY: Final = timedelta(seconds=10)
"""Pause before the lists of a namespace that is not served are repeated, doubled up to the interval of the resync."""


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
        self._placement = training_placement(settings.installation.pods)
        self.metrics = metrics
        self._time = asyncio.get_running_loop().time
        self.watch_health = WatchHealth(self._time)
        watched = (names.PLURAL, "jobs", "pods")
        self.served_namespaces = ServedNamespaces(settings.namespaces, watched, self._time)
        self.queue: WorkQueue[JobRef] = WorkQueue(self._reconcile, settings.workers)
        metrics.track_queue(lambda: self.queue.depth, self.queue.oldest_age, self.stalled_seconds)
        metrics.jobs.served_namespaces = self._served_by_namespace
        self._api = api
        self.child_cache = ChildCache()
        self._cluster = KubeCluster(api, self.child_cache)
        self._review_api = review_api or api
        self._authorizer = PodAuthorizer(KubeCluster(self._review_api, self.child_cache), self._time, clock)
        self._clock = clock
        self._job_cache = JobCache()
        self._reports = ReportStore()
        self._node_failures = NodeFailures()
        election = settings.leader_election
        own = election.installation if election else ""
        self._installations = Installations(own, KubeInstallationReader(api), self._time)
        metrics.track_quarantine(lambda: len(self._node_failures.quarantined(self._clock())))
        self._written_versions: dict[JobRef, str] = {}
        self._reports_since: datetime | None = None
        self._resync: asyncio.Task[None] | None = None
        self._following: asyncio.Task[None] | None = None
        self._starting_since: float | None = None
        self._server: ProgressServer | None = None

    async def start(self) -> None:
        """Fill the child cache, then start the queue, the resync and the progress server.

        Raises:
            TimeoutError: It took longer than STARTUP_SECONDS.
            ApiError: No namespace can be served, because of the operator's rights or a CRD that is missing.
            ClusterBusyError: No namespace can be served, because the API server does not answer.

        """
        self._starting_since = self._time()
        self.served_namespaces.restart()
        await self._list_first()
        self.metrics.jobs.start_leading(self._reports.get)
        self.queue.start()
        self._resync = asyncio.create_task(self._resync_forever(), name="resync")
        self._following = asyncio.create_task(self._installations.follow(self.queue.add), name="installations")
        self._server = await self._start_progress_server()
        self._reports_since = self._clock()

    async def stop(self) -> None:
        """Stop accepting reports and keys, let reconciles in progress finish, and close the API connections."""
        for task in (self._resync, self._following):
            if task is not None:
                task.cancel()
        if self._server is not None:
            await self._server.cleanup()
        await self.queue.drain(DRAIN_TIMEOUT)
        await self._review_api.close()
        await self._api.close()

    def is_working(self) -> bool:
        """Return whether start-up has ended, and nothing keeps the operator from its work."""
        return self._server is not None and self.unhealthy_reason() is None

    def stalled_seconds(self) -> float:
        """Return for how many seconds no reconcile has succeeded although some are due, or start-up has not ended."""
        if self._starting_since is None:
            return 0.0
        return self.queue.stalled_seconds() if self._server else self._time() - self._starting_since

    def unhealthy_reason(self) -> str | None:
        """Return a fault that only a restart or another replica can fix, or None; a standby replica is healthy."""
        if self._starting_since is None:
            return None
        stalled = self.stalled_seconds()
        if self._server is None:
            return f"start-up has not ended for {stalled:.0f} seconds" if stalled > STARTUP_SECONDS else None
        return next(self._faults(self._server, stalled), None)

    def _faults(self, server: ProgressServer, stalled: float) -> Iterator[str]:
        if not self.queue.alive() or self._resync is None or self._resync.done():
            yield "a worker has stopped"
        if self._following is not None and self._following.done():
            yield "other installations are no longer followed"
        if not server.alive():
            yield "the progress server has stopped"
        if self.served_namespaces.unserved_seconds() > UNSERVED_SECONDS:
            yield f"no namespace can be served: {self.served_namespaces.why()}"
        overdue = [ref for ref in self.watch_health.overdue() if self.served_namespaces.is_served(ref.namespace)]
        if overdue:
            yield f"the watch is stalled: no event for {overdue[0]} and {len(overdue) - 1} more"
        if stalled > STUCK_SECONDS:
            yield f"no reconcile has succeeded for {stalled:.0f} seconds"

    def on_job_update(self, ref: JobRef, item: Json) -> None:
        """Queue a QLoRAJob that changed; that of the operator's own status write is kept for the next report."""
        raw = parse_or_skip(names.KIND, parse_job, item)
        if raw is None:
            return
        self.watch_health.on_event(ref, raw.resource_version)
        self._installations.observe(ref, raw.status.get("operator"))
        is_own = self._written_versions.get(ref) == raw.resource_version
        if is_own and raw.status.get("phase") not in RUNNING:
            self._job_cache.forget(ref)
            return
        self._job_cache.on_update(ref, item)
        if not is_own:
            self.queue.add(ref)

    def on_child_event(self, cache: ObjectCache[Child], change: str | None, item: Json) -> None:
        """Queue the QLoRAJob of a Job or pod, if the event changed the cached object."""
        ref = cache.delete(item) if change == "DELETED" else cache.update(item)
        if ref is not None:
            self.queue.add(ref)

    def on_job_delete(self, ref: JobRef, item: Json) -> None:
        """Drop all state of a deleted QLoRAJob; a reconcile that is under way is repeated, and finds it gone."""
        if raw := parse_or_skip(names.KIND, parse_job, item):
            self.watch_health.on_delete(ref, raw.resource_version)
        self._forget(ref)
        if self.queue.is_active(ref):
            self.queue.add(ref)

    def _forget(self, ref: JobRef) -> None:
        self._written_versions.pop(ref, None)
        self._job_cache.forget(ref)
        self._installations.forget(ref)
        self.watch_health.forget(ref)
        self.metrics.jobs.set_phase(ref, None)
        self._reports.forget(ref)
        self._authorizer.on_job_delete(ref)

    async def _reconcile(self, ref: JobRef) -> timedelta | None:
        bind_task_fields(namespace=ref.namespace, job=ref.name)
        if other := self._installations.find_other(ref):
            await self._leave_to(other, ref)
            return None
        context = self._make_context(ref)
        try:
            with self.metrics.time_reconcile():
                result = await self._reconcile_once(ref, context)
        except ClusterBusyError:
            raise
        except Exception as error:
            await self._report_error(ref, error, context)
            raise
        if result.belongs_to:
            self._installations.observe(ref, result.belongs_to)
            await self._leave_to(result.belongs_to, ref)
            return None
        if result.gone:
            self._forget(ref)
            return None
        self.metrics.on_reconciled(ref, result)
        if result.written_version is not None and result.status is not None:
            self._on_written(ref, result.written_version)
            self._installations.on_write(ref, result.status.operator)
            if not only_progress(result):
                _log.info("%s: %s", result.status.reason, result.status.message, extra=_summary(result.status))
        if result.status is not None and is_terminal(result.status):
            self._reports.forget(ref)
        elif result.status is not None and result.status.phase not in RUNNING:
            self._reports.set_idle(ref)
        elif result.status is not None and result.status.last_report is not None:
            self._reports.expect(ref, result.status.last_report.updated_at)
        await self._update_node_failures(ref, result, context)
        return result.requeue_after

    async def _leave_to(self, other: str, ref: JobRef) -> None:
        """Do nothing to a QLoRAJob of another installation; log it for the first of each namespace, with an Event."""
        self._job_cache.forget(ref)
        self.metrics.jobs.set_phase(ref, None)
        if not self._installations.leave(ref):
            return
        own = self._installations.own or "an operator outside the cluster"
        message = f"namespace {ref.namespace} is served by installation {other}, so {own} leaves its QLoRAJobs alone"
        _log.warning("%s", message)
        if raw := await self._cluster.read_job(ref):
            owner = Owner(ref, raw.uid)
            await self._cluster.record_event(build_installation_event(owner, own, message, self._clock()))

    def _served_by_namespace(self) -> Iterator[tuple[str, bool]]:
        left = set(self._installations.left_namespaces())
        for namespace, served in self.served_namespaces.by_namespace():
            yield namespace, served and namespace not in left
        yield from ((namespace, False) for namespace in sorted(left) if namespace not in self.settings.namespaces)

    def _make_context(self, ref: JobRef) -> ReconcileContext:
        now = self._clock().replace(microsecond=0)
        return ReconcileContext(
            now,
            self._reports.get(ref),
            self._reports_since,
            self._reports.job_uid(ref),
            self._node_failures.quarantined(now),
            frozenset(self._node_failures.quarantine_ends(now)),
            self._reports_since is not None and now >= self._reports_since + NODE_FAILURES_LOAD,
            Reception(
                self._reports.others(ref), self._reports.resumed_at(ref.namespace), self._reports.refused_at(ref)
            ),
            self._installations.claimant(ref.namespace),
            self.settings.gpu_prices,
            *self._placement,
        )

    async def _update_node_failures(self, ref: JobRef, result: ReconcileResult, context: ReconcileContext) -> None:
        """Take the attempts of a run into account, and record an Event for each node that is quarantined by them."""
        if result.status is None:
            return
        self._node_failures.update(ref, result.status.attempts, result.status.checkpoint)
        if result.request is None or result.written_version is None:
            return
        owner = Owner(ref, result.request.raw.uid)
        for node, until in self._node_failures.quarantined(context.now).items():
            if node not in context.quarantined_nodes:
                _log.warning("node %s is quarantined until %s", node, until, extra=log_fields(node=node))
                await self._cluster.record_event(build_quarantine_event(owner, node, until, context.now))

    async def _reconcile_once(self, ref: JobRef, context: ReconcileContext) -> ReconcileResult:
        copy = self._job_cache.take(ref)
        cached = read_copy(copy)
        if cached is not None and self.watch_health.has_newer_version(ref, cached.resource_version):
            copy = cached = None
        result = await reconcile(ref, self._cluster, self.settings.installation, context, cached)
        running = result.status is not None and result.status.phase in RUNNING
        if copy is not None and running and result.written_version is None:
            self._job_cache.put_back(ref, copy)  # for the next report
        return result

    def _on_written(self, ref: JobRef, version: str) -> None:
        self._written_versions[ref] = version
        self.watch_health.expect_version(ref, version)

    async def _report_error(self, ref: JobRef, error: Exception, context: ReconcileContext) -> None:
        """Write an error into the status of the QLoRAJob that it kept from being reconciled."""
        try:
            version = await write_error(ref, error, self._cluster, context)
        except Exception as failure:
            _log.warning("the error was not written to the status: %r", failure)
            return
        if version is not None:
            self._on_written(ref, version)

    async def _list_first(self) -> None:
        """List the children of each namespace; one that fails is retried later, unless none is left."""
        deadline = self._time() + CRD_TIMEOUT.total_seconds()
        failures: list[Exception] = []
        namespaces = self.settings.namespaces or ("",)
        for namespace in namespaces:
            try:
                async with asyncio.timeout(STARTUP_SECONDS / len(namespaces)):
                    await self._wait_for_crd(namespace, deadline)
                    await self._cluster.relist([namespace])
            except Exception as error:
                self.served_namespaces.on_failure(namespace, LIST, error)
                failures.append(error)
            else:
                self.served_namespaces.on_success(namespace, LIST)
        if len(failures) == len(namespaces):
            raise failures[0]

    async def _wait_for_crd(self, namespace: str, deadline: float) -> None:
        """Wait until the CRD is served: an operator that starts before it would watch nothing and appear healthy."""
        while True:
            try:
                await self._cluster.check_api_served([namespace])
            except (ClusterBusyError, NotFoundError) as error:
                if self._time() > deadline:
                    raise
                _log.info("waiting for the QLoRAJob API: %s", error)
                await asyncio.sleep(1)
            else:
                return

    async def _resync_forever(self) -> None:
        """Resync all namespaces at an interval, and those that failed sooner, with back-off."""
        next_resync, retry = self._time() + self._resync_seconds(), FIRST_RETRY
        while True:
            await asyncio.sleep(self._pause_seconds(next_resync, retry))
            if self._time() >= next_resync or not self.served_namespaces.unlisted():
                await self.resync()
                next_resync, retry = self._time() + self._resync_seconds(), FIRST_RETRY
            else:
                await self.resync(self.served_namespaces.unlisted())
                retry = min(retry * 2, self.settings.resync)

    def _resync_seconds(self) -> float:
        return self.settings.resync.total_seconds() * random.uniform(0.9, 1.1)  # noqa: S311 (no secret)

    def _pause_seconds(self, next_resync: float, retry: timedelta) -> float:
        left = max(next_resync - self._time(), 0.0)
        return min(left, retry.total_seconds()) if self.served_namespaces.unlisted() else left

    async def resync(self, namespaces: Collection[str] = ()) -> None:
        """Resync each of the namespaces, or all that are watched; what fails in one does not reach the others."""
        for namespace in namespaces or self.settings.namespaces or ("",):
            try:
                await self._resync_namespace(namespace)
            except Exception as error:
                self.served_namespaces.on_failure(namespace, LIST, error)
                foreseen = isinstance(error, ApiError | ClusterBusyError)
                _log.info("resync of namespace %r failed, will retry: %r", namespace, error, exc_info=not foreseen)
            else:
                self.served_namespaces.on_success(namespace, LIST)

    async def _resync_namespace(self, namespace: str) -> None:
        """Relist children and QLoRAJobs; queue those that are unfinished, gone, or were stale in the cache."""
        for ref in await self._cluster.relist([namespace]):
            self.queue.add(ref)
        before = self.watch_health.known_versions(namespace)
        jobs = await self._cluster.list_jobs([namespace])
        gone = self.watch_health.on_list(before, {job.ref: job.resource_version for job in jobs})
        for ref in (*gone, *(job.ref for job in jobs if not job.fully_reconciled)):
            self.queue.add(ref)

    async def _start_progress_server(self) -> ProgressServer:
        endpoint = ProgressEndpoint(self._authorizer, self._reports, self.queue.add_after, self._clock)
        server = ProgressServer(endpoint.application(), self.settings.progress_port)
        await server.start()
        return server


def only_progress(result: ReconcileResult) -> bool:
    """Return whether a status says the same as before, but for what the last report says."""
    before, after = result.request.previous_status if result.request else None, result.status
    if before is None or after is None:
        return False
    return all(getattr(before, name) == getattr(after, name) for name in ("phase", "reason", "message", "attempt"))


def _summary(status: QLoRAJobStatus) -> dict[str, Any]:
    return log_fields(phase=status.phase, reason=status.reason, attempt=status.attempt)
