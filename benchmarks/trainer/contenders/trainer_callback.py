"""Times the steps of transformers' Trainer and TRL's SFTTrainer."""

from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback

from benchmarks.trainer.measurement import Stopwatch
from benchmarks.trainer.task import GLOBAL_BATCH


class TimedSteps(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Starts and ends the stopwatch's steps; rows are in order, so a step's rows follow from its number."""

    def __init__(self, stopwatch: Stopwatch, rows: Sequence[tuple[int, int]]) -> None:
        self._stopwatch = stopwatch
        self._rows = rows

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start the stopwatch."""
        self._stopwatch.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002 (transformers' names)
        """Record a step."""
        start = (state.global_step - 1) * GLOBAL_BATCH
        self._stopwatch.end_step(self._rows[start : start + GLOBAL_BATCH])
