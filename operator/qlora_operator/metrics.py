"""Prometheus metrics of the operator itself."""

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from qlora_api.names import Phase
from qlora_operator.values import JobRef


class Metrics:
    """Counts passes and jobs; one registry per process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._passes = Counter(
            "qlora_operator_reconcile", "Passes over a QLoRAJob.", ["outcome"], registry=self.registry
        )
        self._seconds = Histogram("qlora_operator_reconcile_seconds", "Time of a pass.", registry=self.registry)
        self._jobs = Gauge("qlora_operator_jobs", "QLoRAJobs by phase.", ["phase"], registry=self.registry)
        self.depth = Gauge("qlora_operator_queue_depth", "QLoRAJobs that wait for a worker.", registry=self.registry)
        self._phases: dict[JobRef, Phase] = {}

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Count and time one pass."""
        start = perf_counter()
        try:
            yield
        except Exception:
            self._passes.labels("error").inc()
            raise
        else:
            self._passes.labels("success").inc()
        finally:
            self._seconds.observe(perf_counter() - start)

    def saw(self, ref: JobRef, phase: Phase | None) -> None:
        """Move a job from its last phase to this one; none means that it is gone."""
        before = self._phases.pop(ref, None)
        if before is not None:
            self._jobs.labels(before.value).dec()
        if phase is not None:
            self._phases[ref] = phase
            self._jobs.labels(phase.value).inc()

    def render(self) -> bytes:
        """Return the exposition format."""
        return generate_latest(self.registry)
