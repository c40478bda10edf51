"""Asynchronous checkpointing: decides when a checkpoint is due and uploads it from a background thread."""

import threading
import time
from collections.abc import Callable
from typing import Final

from qlora_api.v1alpha1 import CheckpointSpec, to_timedelta
from qlora_trainer.runtime.metrics import METER
from qlora_trainer.training.checkpoint_store import CheckpointStore
from qlora_trainer.training.state import TrainingState

_CLOSE_SECONDS: Final = 20.0
"""Longest wait for a pending upload after a failure; the rest of the grace period is for the termination message."""


class AsyncCheckpointer:
    """Saves one checkpoint at a time; one that becomes due during an upload waits until the upload is done."""

    def __init__(
        self, checkpoints: CheckpointStore, spec: CheckpointSpec, note: Callable[[str], None], step: int
    ) -> None:
        self._checkpoints = checkpoints
        self._spec = spec
        self._note = note
        self._saved_step = step
        self._saved_at = time.monotonic()
        self._thread: threading.Thread | None = None

    def should_checkpoint(self, step: int, last: bool) -> bool:
        """Return whether to save a checkpoint after a step.

        Args:
            step: Number of steps done.
            last: Whether the loop ends after this step; waits for a pending upload, and ignores the interval.

        """
        if last:
            self._wait()  # the pending upload may be for this very step, and it may fail
            return step != self._saved_step
        return not self._is_saving() and step != self._saved_step and self._is_due(step)

    def checkpoint(self, state: TrainingState, last: bool) -> None:
        """Start to upload a state in the background.

        Args:
            state: A copy that the caller no longer changes.
            last: Whether to return only when the upload is done.

        """
        captured_at = time.monotonic()
        self._thread = threading.Thread(target=self._save, args=(state, captured_at), name="checkpoint", daemon=True)
        self._thread.start()
        if last:
            self._wait()

    def close(self) -> None:
        """Wait a bounded time for a pending upload."""
        self._wait(_CLOSE_SECONDS)

    def _save(self, state: TrainingState, captured_at: float) -> None:
        try:
            self._checkpoints.save(state, self._spec.keep)
        except Exception as error:
            # A failed checkpoint must never end a training run; the next step tries again.
            self._note(f"checkpoint of step {state.step} failed, will be retried: {error}")
        else:
            self._saved_step, self._saved_at = state.step, captured_at
            METER.checkpoint(time.monotonic() - captured_at)

    def _is_due(self, step: int) -> bool:
        if self._spec.steps is not None:
            return step - self._saved_step >= self._spec.steps
        return time.monotonic() - self._saved_at >= to_timedelta(self._spec.every).total_seconds()

    def _is_saving(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _wait(self, seconds: float | None = None) -> None:
        if self._thread is not None:
            self._thread.join(seconds)
