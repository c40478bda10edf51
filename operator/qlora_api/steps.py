"""Number of optimizer steps of a run: for the plan, the learning rate schedule and the digest of a result."""

from math import ceil
from typing import Final

from qlora_api.v1alpha1 import TrainingSpec

EPOCH_DIGITS: Final = 6
"""Decimal digits of epochs x steps that count: 1.1 x 10 is 11.000000000000002 in floating point, but means 11 steps."""


def steps_per_epoch(training: TrainingSpec, rows: int) -> int:
    """Return the optimizer steps of one epoch; its last batch may be smaller."""
    return max(1, ceil(rows / training.global_batch_size))


def steps_of_epochs(training: TrainingSpec, rows: int) -> int:
    """Return the optimizer steps of all epochs; a fraction of an epoch is rounded up to full steps."""
    return max(1, ceil(round(training.epochs * steps_per_epoch(training, rows), EPOCH_DIGITS)))


def total_steps(training: TrainingSpec, rows: int) -> int:
    """Return the optimizer steps of a run: those of its epochs, or maxSteps if that is less."""
    steps = steps_of_epochs(training, rows)
    return steps if training.max_steps is None else min(steps, training.max_steps)


def warmup_steps(training: TrainingSpec, total: int) -> int:
    """Return the number of warm-up steps, in which the learning rate rises."""
    return ceil(training.warmup_ratio * total)
