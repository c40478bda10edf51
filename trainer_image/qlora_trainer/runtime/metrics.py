"""Prometheus metrics of this process, served from a thread.

Nothing here can fail or delay training: a step only sets some numbers, and a port in use is only logged.
"""

import math
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
    start_http_server,
)

from qlora_api import metrics
from qlora_api.report import StepRecord, ValidationRecord

disable_created_metrics()  # type: ignore[no-untyped-call]


class Meter:
    """Metrics of one run."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._step = Gauge(*metrics.STEP.constructor_args, registry=registry)
        self._steps = Gauge(*metrics.PLANNED_STEPS.constructor_args, registry=registry)
        self._loss = _nan_gauge(metrics.TRAINING_LOSS, registry)
        self._held_out_loss = _nan_gauge(metrics.HELD_OUT_LOSS, registry)
        self._learning_rate = _nan_gauge(metrics.LEARNING_RATE, registry)
        self._gradient_norm = _nan_gauge(metrics.GRADIENT_NORM, registry)
        self._tokens = Counter(*metrics.TOKENS.constructor_args, registry=registry)
        self._token_rate = _nan_gauge(metrics.TOKEN_RATE, registry)
        self._step_seconds = _histogram(metrics.STEP_SECONDS, registry)
        self._peak_memory = Gauge(*metrics.PEAK_MEMORY.constructor_args, registry=registry)
        self._checkpoint_seconds = _histogram(metrics.CHECKPOINT_SECONDS, registry)
        self._upload_seconds = _histogram(metrics.UPLOAD_SECONDS, registry)
        self._uploaded = Counter(*metrics.UPLOADED_BYTES.constructor_args, registry=registry)

    def start(self, done: int, total: int, peak_memory: Callable[[], float]) -> None:
        """Record the start of training after `done` steps; peak memory is read at each scrape."""
        self._step.set(done)
        self._steps.set(total)
        self._peak_memory.set_function(peak_memory)

    def step(self, record: StepRecord) -> None:
        """Record a finished step."""
        self._step.set(record.step)
        self._loss.set(record.loss)
        self._learning_rate.set(record.learning_rate)
        self._gradient_norm.set(record.grad_norm)
        self._tokens.inc(record.tokens)
        self._token_rate.set(record.tokens / record.seconds if record.seconds else 0.0)
        self._step_seconds.observe(record.seconds)

    def validation(self, record: ValidationRecord) -> None:
        """Record a validation."""
        self._held_out_loss.set(record.loss)

    def checkpoint(self, seconds: float) -> None:
        """Record the duration of a complete checkpoint."""
        self._checkpoint_seconds.observe(seconds)

    @contextmanager
    def upload(self, size: int) -> Iterator[None]:
        """Count and time an upload, if it succeeds."""
        start = time.perf_counter()
        yield
        self._upload_seconds.observe(time.perf_counter() - start)
        self._uploaded.inc(size)

    def render(self) -> bytes:
        """Return the metrics in Prometheus' text format."""
        return generate_latest(self.registry)


def _nan_gauge(metric: metrics.Metric, registry: CollectorRegistry) -> Gauge:
    """Return a gauge that is NaN until it is set: 0 would look like a very good loss."""
    gauge = Gauge(*metric.constructor_args, registry=registry)
    gauge.set(math.nan)
    return gauge


def _histogram(metric: metrics.Metric, registry: CollectorRegistry) -> Histogram:
    return Histogram(*metric.constructor_args, buckets=metric.buckets, registry=registry)


METER: Final = Meter()
"""Shared by all parts of this process, as LIVENESS is."""


@contextmanager
def serve_metrics(note: Callable[[str], None], port: int = metrics.PORT, meter: Meter = METER) -> Iterator[None]:
    """Serve metrics while the block runs; if the port cannot be opened, log it and continue."""
    address = "::" if socket.has_dualstack_ipv6() else "0.0.0.0"  # noqa: S104 (Prometheus scrapes from outside)
    try:
        server, thread = start_http_server(port, address, meter.registry)
    except OSError as error:
        note(f"metrics are not served: port {port}: {error}")
        yield
        return
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
