"""Turns step records into progress reports, with percentage, throughput and remaining time."""

import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime

from qlora_api.names import Phase
from qlora_api.report import StepRecord
from qlora_api.v1alpha1 import Checkpoint, ManifestRef, Progress
from qlora_trainer.observability.progress import INTERVAL_SECONDS, ProgressSink


class ProgressTracker:
    """Reports every phase and step of a run."""

    def __init__(self, sink: ProgressSink, total_steps: int) -> None:
        self._sink = sink
        self._total = total_steps
        self._phase = Phase.TRAINING
        self._last: StepRecord | None = None
        self._seconds = 0.0
        self._tokens = 0
        self._checkpoint: Checkpoint | None = None
        self._manifest: ManifestRef | None = None
        self._reported_at = time.monotonic()
        self._lock = threading.Lock()

    def resume(self, records: Sequence[StepRecord]) -> None:
        """Count the steps of an earlier attempt as done."""
        for record in records:
            self._count(record)
        self._report()

    def enter_phase(self, phase: Phase) -> None:
        """Report the start of a phase."""
        self._phase = phase
        self._report()

    def on_step(self, record: StepRecord) -> None:
        """Report a finished step."""
        self._count(record)
        self._report()

    def on_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Report a checkpoint; called from the thread that wrote it."""
        self._checkpoint = checkpoint
        self._report()

    def on_manifest(self, manifest: ManifestRef) -> None:
        """Report the manifest of the result, before it is written."""
        self._manifest = manifest
        self._report()

    def on_heartbeat(self) -> None:
        """Repeat the last report during a validation, at most once per interval."""
        if time.monotonic() - self._reported_at >= INTERVAL_SECONDS:
            self._report()

    def skip_remaining_steps(self) -> None:
        """Count the steps that early stopping skipped as done."""
        self._total = self._done

    @property
    def _done(self) -> int:
        return self._last.step if self._last else 0

    def _count(self, record: StepRecord) -> None:
        """Add a step to the running sums, so that the cost of a report does not depend on the number of steps."""
        with self._lock:
            self._last = record
            self._seconds += record.seconds
            self._tokens += record.tokens

    def _report(self) -> None:
        # Two threads report, and the sink must get the reports in order.
        with self._lock:
            self._reported_at = time.monotonic()
            self._sink.report(self._describe())

    def _describe(self) -> Progress:
        done, last, seconds, tokens = self._done, self._last, self._seconds, self._tokens
        training = self._phase == Phase.TRAINING and last is not None
        return Progress(
            percent=100 * done // self._total,
            step=done,
            total_steps=self._total,
            remaining_seconds=round(seconds / done * (self._total - done)) if training else None,
            loss=last.loss if last else None,
            tokens_per_second=round(tokens / seconds, 1) if last and seconds else None,
            phase=self._phase,
            checkpoint=self._checkpoint,
            manifest=self._manifest,
            updated_at=datetime.now(UTC),
        )


def time_and_tokens(records: Sequence[StepRecord]) -> tuple[float, int]:
    """Return the total seconds and tokens of the steps."""
    return sum(record.seconds for record in records), sum(record.tokens for record in records)
