"""Prometheus metrics of the operator: reconciles and API calls, QLoRAJobs by phase, progress of the running ones.

Series of single QLoRAJobs are computed at scrape time from the progress reports that are in memory anyway: a job that
does not run costs nothing, and one that has ended is no longer exported.
"""

from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from time import perf_counter
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from qlora_api import __version__, metrics
from qlora_api.job_ref import JobRef
from qlora_api.lost_gpu_time import lost_gpu_seconds
from qlora_api.names import RUNNING, TERMINAL, Phase
from qlora_api.v1alpha1 import Progress, QLoRAJobStatus, RunUsage
from qlora_api.v1alpha1.usage import PARTS
from qlora_operator.cluster.interface import ClusterBusyError
from qlora_operator.controller.result import ReconcileResult
from qlora_operator.lifecycle import is_blamed

disable_created_metrics()  # type: ignore[no-untyped-call]


class JobCollector(Collector):
    """QLoRAJobs by phase and the progress of running ones; exports nothing on a standby replica."""

    def __init__(self) -> None:
        self.report_of: Callable[[JobRef], Progress | None] = _no_report
        self._phases: dict[JobRef, Phase] = {}
        self._is_leader = False
        self.served_namespaces: Callable[[], Iterable[tuple[str, bool]]] = tuple

    def start_leading(self, report_of: Callable[[JobRef], Progress | None]) -> None:
        """Start exporting: as the leader, this replica knows every QLoRAJob and its reports."""
        self._is_leader, self.report_of = True, report_of

    def set_phase(self, ref: JobRef, phase: Phase | None) -> None:
        """Record the phase of a QLoRAJob; None means that it was deleted."""
        if phase is None:
            self._phases.pop(ref, None)
        else:
            self._phases[ref] = phase

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield the current samples."""
        jobs = _family(metrics.JOBS)
        tally = Tally(self._phases.values())
        for phase in Phase if self._is_leader else ():
            jobs.add_metric([phase.value], tally[phase])
        yield jobs
        served = _family(metrics.NAMESPACE_SERVED)
        for namespace, is_served in self.served_namespaces() if self._is_leader else ():
            served.add_metric([namespace], is_served)
        yield served
        yield from self._collect_reports()

    def _collect_reports(self) -> Iterator[GaugeMetricFamily]:
        running = [(ref, self.report_of(ref)) for ref, phase in self._phases.items() if phase in RUNNING]
        for metric, read in _REPORT_VALUES.items():
            family = _family(metric)
            for ref, report in running:
                value = read(report) if report else None
                if value is not None:
                    family.add_metric(list(ref), value)
            yield family


def _family(metric: metrics.Metric) -> GaugeMetricFamily:
    return GaugeMetricFamily(metric.name, metric.help, labels=metric.labels)


def _no_report(_: JobRef) -> None:
    """Return None: no pod reports to a standby replica."""


def progress_ratio(report: Progress) -> float:
    """Return the completed fraction of the steps (0 to 1): exact if steps are reported, else from the percentage."""
    if report.step is not None and report.total_steps:
        return min(report.step / report.total_steps, 1.0)
    return report.percent / 100


_REPORT_VALUES: Final[dict[metrics.Metric, Callable[[Progress], float | None]]] = {
    metrics.PROGRESS: progress_ratio,
    metrics.ETA: lambda report: report.remaining_seconds,
    metrics.LOSS: lambda report: report.loss,
}


class Metrics:
    """Metrics of one operator, in a registry of their own."""

    def __init__(self, is_leader: Callable[[], bool]) -> None:
        self.registry = registry = CollectorRegistry()
        self.jobs = JobCollector()
        registry.register(self.jobs)
        Gauge(*metrics.BUILD.constructor_args, registry=registry).labels(__version__).set(1)
        self._is_leader = is_leader
        self._leader = Gauge(*metrics.LEADER.constructor_args, registry=registry)
        self._leader.set_function(is_leader)
        self._reconciles = Counter(*metrics.RECONCILES.constructor_args, registry=registry)
        self._reconcile_seconds = _histogram(metrics.RECONCILE_SECONDS, registry)
        self._calls = Counter(*metrics.API_REQUESTS.constructor_args, registry=registry)
        self._call_seconds = _histogram(metrics.API_SECONDS, registry)
        self._queue_depth = Gauge(*metrics.QUEUE_DEPTH.constructor_args, registry=registry)
        self._queue_age = Gauge(*metrics.QUEUE_AGE.constructor_args, registry=registry)
        self._stalled = Gauge(*metrics.STALLED.constructor_args, registry=registry)
        self._errors = Counter(*metrics.RECONCILE_ERRORS.constructor_args, registry=registry)
        self._finished = Counter(*metrics.JOBS_FINISHED.constructor_args, registry=registry)
        self._attempts = Counter(*metrics.ATTEMPTS.constructor_args, registry=registry)
        self._node_failures = Counter(*metrics.NODE_FAILURES.constructor_args, registry=registry)
        self._quarantined = Gauge(*metrics.NODES_QUARANTINED.constructor_args, registry=registry)
        self._gpu_seconds = Counter(*metrics.GPU_SECONDS.constructor_args, registry=registry)
        self._gpu_seconds_lost = Counter(*metrics.GPU_SECONDS_LOST.constructor_args, registry=registry)
        self._gpu_seconds_saved = Counter(*metrics.GPU_SECONDS_SAVED.constructor_args, registry=registry)
        self._jobs_without_gpu = Counter(*metrics.JOBS_WITHOUT_GPU.constructor_args, registry=registry)
        self._wait_seconds = _histogram(metrics.JOB_WAIT_SECONDS, registry)
        self._run_seconds = _histogram(metrics.JOB_RUN_SECONDS, registry)
        for result in ("success", "busy", "error"):
            self._reconciles.labels(result)

    def track_queue(
        self, depth: Callable[[], float], oldest_age: Callable[[], float], stalled: Callable[[], float]
    ) -> None:
        """Read depth and age of the work queue, and for how long nothing was done, at each scrape."""
        self._queue_depth.set_function(depth)
        self._queue_age.set_function(oldest_age)
        self._stalled.set_function(stalled)

    def track_work(self, is_working: Callable[[], bool]) -> None:
        """Count this replica as the leader only while it works."""
        self._leader.set_function(lambda: self._is_leader() and is_working())

    def track_quarantine(self, count: Callable[[], float]) -> None:
        """Count the quarantined nodes at each scrape."""
        self._quarantined.set_function(count)

    @contextmanager
    def time_reconcile(self) -> Iterator[None]:
        """Count and time one reconcile."""
        start, result = perf_counter(), "error"
        try:
            yield
            result = "success"
        except ClusterBusyError:
            result = "busy"
            raise
        except Exception as error:
            self._errors.labels(type(error).__name__).inc()
            raise
        finally:
            self._reconciles.labels(result).inc()
            self._reconcile_seconds.observe(perf_counter() - start)

    def on_api_call(self, verb: str, code: int | None, seconds: float) -> None:
        """Count and time a call to the API server; the code is None if it did not answer."""
        self._calls.labels(verb, str(code) if code else "none").inc()
        self._call_seconds.labels(verb).observe(seconds)

    def on_reconciled(self, ref: JobRef, result: ReconcileResult) -> None:
        """Count the phase that a reconcile found, and the transitions that it was the first to write."""
        status, request = result.status, result.request
        self.jobs.set_phase(ref, status.phase if status else None)
        if status is None or request is None or result.written_version is None:
            return
        self._count_gpu_time(ref.namespace, request.previous_status, status)
        if request.previous_status.phase in TERMINAL:
            return
        self._count_attempts(request.previous_status, status)
        start, before = training_started_at(status), training_started_at(request.previous_status)
        if start is not None and before is None:
            self._wait_seconds.observe(_seconds(start - request.raw.created_at))
        if status.phase in TERMINAL and status.finished_at and status.reason:
            self._finished.labels(status.phase.value, status.reason.value).inc()
            if not status.attempts:
                self._jobs_without_gpu.labels(ref.namespace, status.reason.value).inc()
            if start is not None:
                self._run_seconds.labels(status.phase.value).observe(_seconds(status.finished_at - start))

    def _count_gpu_time(self, namespace: str, before: QLoRAJobStatus, after: QLoRAJobStatus) -> None:
        """Count what a write added: each GPU-second is in one write only, whichever replica writes it.

        Except with an older CRD, which stores nothing of it: there each write would add everything again.
        """
        if before.usage is None and any(attempt.started_at for attempt in before.attempts):
            return
        old, new = before.usage or RunUsage(), after.usage or RunUsage()
        for part in PARTS:
            self._gpu_seconds.labels(namespace, part).inc(max(getattr(new, part) - getattr(old, part), 0))
        for reason, seconds in (lost_gpu_seconds(after) - lost_gpu_seconds(before)).items():
            self._gpu_seconds_lost.labels(namespace, reason.value).inc(seconds)
        self._gpu_seconds_saved.labels(namespace).inc(max(new.saved - old.saved, 0))

    def _count_attempts(self, before: QLoRAJobStatus, after: QLoRAJobStatus) -> None:
        ended = {attempt.number for attempt in before.attempts if attempt.reason}
        for attempt in after.attempts:
            if attempt.reason and attempt.number not in ended:
                self._attempts.labels(attempt.reason.value).inc()
                if is_blamed(attempt):
                    self._node_failures.labels(attempt.node).inc()

    def render(self) -> bytes:
        """Return all metrics in the Prometheus exposition format."""
        return generate_latest(self.registry)


def training_started_at(status: QLoRAJobStatus) -> datetime | None:
    """Return when the first training container started, or None before that."""
    return min((attempt.started_at for attempt in status.attempts if attempt.started_at), default=None)


def _histogram(metric: metrics.Metric, registry: CollectorRegistry) -> Histogram:
    return Histogram(*metric.constructor_args, buckets=metric.buckets, registry=registry)


def _seconds(duration: timedelta) -> float:
    """Return a duration in seconds, at least 0: its ends may come from the clocks of two machines."""
    return max(duration.total_seconds(), 0.0)
