"""How many steps a recipe takes: for the plan, for the learning rate, and for the name of a result."""

from math import ceil
from typing import Final

from qlora_api.v1alpha1 import TrainingSpec

EPOCH_DIGITS: Final = 6
"""Digits of epochs x steps that count: 1.1 x 10 is 11.000000000000002 in floating point, and eleven steps to a user."""


def steps_per_epoch(training: TrainingSpec, rows: int) -> int:
    """Return the optimizer steps of one pass; the last batch of an epoch may be short."""
    return max(1, ceil(rows / training.global_batch_size))


def steps_of_epochs(training: TrainingSpec, rows: int) -> int:
    """Return the optimizer steps of all epochs; a started epoch's share is rounded up."""
    return max(1, ceil(round(training.epochs * steps_per_epoch(training, rows), EPOCH_DIGITS)))


def total_steps(training: TrainingSpec, rows: int) -> int:
    """Return the optimizer steps of a run: its epochs', or maxSteps where that is less."""
    steps = steps_of_epochs(training, rows)
    return steps if training.max_steps is None else min(steps, training.max_steps)


def warmup_steps(training: TrainingSpec, total: int) -> int:
    """Return the steps with a rising learning rate."""
    return ceil(training.warmup_ratio * total)
