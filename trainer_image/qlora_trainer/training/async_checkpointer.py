"""When the state of a training is kept: beside the training, in a thread that is its only writer."""

import threading
import time
from collections.abc import Callable
from typing import Final

from qlora_api.v1alpha1 import CheckpointSpec, to_timedelta
from qlora_trainer.runtime.metrics import METER
from qlora_trainer.training.checkpoint_store import CheckpointStore
from qlora_trainer.training.state import TrainingState

_CLOSE_SECONDS: Final = 20.0
"""Longest wait for a checkpoint under way where a run failed; the rest of the grace period is for the last word."""


class AsyncCheckpointer:
    """Keeps states, one at a time: a checkpoint that is due while one is under way waits for the next occasion."""

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
        """Return whether to keep the state after a step: it is time to, or there will be no other occasion."""
        if last:
            self._wait()  # it may be of this very step, and it may fail
            return step != self._saved_step
        return not self._is_under_way() and step != self._saved_step and self._is_due(step)

    def checkpoint(self, state: TrainingState, last: bool) -> None:
        """Start to save a state, which nobody changes any more; the last one is complete when this returns."""
        captured_at = time.monotonic()
        self._thread = threading.Thread(target=self._save, args=(state, captured_at), name="checkpoint", daemon=True)
        self._thread.start()
        if last:
            self._wait()

    def close(self) -> None:
        """Give a checkpoint under way the time to become complete."""
        self._wait(_CLOSE_SECONDS)

    def _save(self, state: TrainingState, captured_at: float) -> None:
        try:
            self._checkpoints.save(state, self._spec.keep)
        except Exception as error:
            # Whatever it is: the training is worth more than its insurance, and the next occasion tries again.
            self._note(f"no checkpoint of step {state.step} was written: {error}")
        else:
            self._saved_step, self._saved_at = state.step, captured_at
            METER.checkpoint(time.monotonic() - captured_at)

    def _is_due(self, step: int) -> bool:
        if self._spec.steps is not None:
            return step - self._saved_step >= self._spec.steps
        return time.monotonic() - self._saved_at >= to_timedelta(self._spec.every).total_seconds()

    def _is_under_way(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _wait(self, seconds: float | None = None) -> None:
        if self._thread is not None:
            self._thread.join(seconds)
