"""Compares predicted with measured bytes."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

from benchmarks.memory.combinations import Combination
from benchmarks.memory.measure import Measured
from benchmarks.memory.predict import Predicted

MEDIAN: Final = 0.03
WORST: Final = 0.10
"""Bounds of the median and of the largest relative error of a step's peak."""


@dataclass(frozen=True)
class Comparison:
    """One combination."""

    combination: Combination
    measured: Measured
    predicted: Predicted

    @property
    def step_error(self) -> float:
        """Return the relative error of a step's peak."""
        return self.predicted.step / self.measured.step - 1

    @property
    def kept_error(self) -> float:
        """Return the relative error of the bytes saved for backward."""
        return self.predicted.kept / self.measured.kept - 1


@dataclass(frozen=True)
class Errors:
    """Median and largest absolute value of relative errors."""

    median: float
    worst: float

    @property
    def holds(self) -> bool:
        """Return whether they are within the bounds."""
        return self.median <= MEDIAN and self.worst <= WORST


def errors(values: Sequence[float]) -> Errors:
    """Summarize relative errors."""
    sizes = [abs(value) for value in values]
    return Errors(median(sizes), max(sizes))
