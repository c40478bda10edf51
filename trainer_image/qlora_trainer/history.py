"""What happened in a training so far, and what follows from that alone, so that a resumed run decides as any other."""

from collections.abc import Iterable, Sequence
from math import inf
from statistics import median
from typing import Final

from qlora_api.report import HeldOutRecord, StepRecord
from qlora_api.v1alpha1 import EarlyStoppingSpec, TrainingSpec

DIVERGED_STEPS: Final = 20
"""Steps in a row that must be above the level: a spike that clips itself away is over after a few."""
DIVERGED_RISE: Final = 1.5
"""Nats per token above the level, which is 4.5 times its perplexity."""


class History:
    """The steps that were taken, and the looks at the held-out rows between them; it only grows.

    What follows from all of it is kept up to date, so that a step costs the same however many were before it.
    """

    def __init__(self, steps: Iterable[StepRecord] = (), held_out: Iterable[HeldOutRecord] = ()) -> None:
        self.steps: list[StepRecord] = []
        self.held_out: list[HeldOutRecord] = list(held_out)
        self._level = inf
        for record in steps:
            self.add_step(record)

    def add_step(self, record: StepRecord) -> None:
        """Note a step."""
        self.steps.append(record)
        done = len(self.steps)
        if done >= 2 * DIVERGED_STEPS and done % DIVERGED_STEPS == 0:
            block = self.steps[done - 2 * DIVERGED_STEPS : done - DIVERGED_STEPS]
            self._level = min(self._level, median(record.loss for record in block))

    def add_look(self, record: HeldOutRecord) -> None:
        """Note a look at the held-out rows."""
        self.held_out.append(record)

    def copy(self) -> "History":
        """Return the history as it is now."""
        return History(self.steps, self.held_out)

    def level_before_divergence(self) -> float | None:
        """Return the level that a diverged loss has left for good, or None while all is well.

        The level is the lowest median of a block of DIVERGED_STEPS steps that the newest as many are not in. Normal
        noise stays below: even where one row is a batch, and losses deviate by one nat from a steady mean, the lowest
        of a thousand medians is 0.9 below the mean, so that one step is above the limit with a chance of 0.28, and
        twenty in a row are with one of 8e-12. A loss that rises and comes back within the twenty does not end the run,
        and neither does one that was never low.
        """
        recent = self.steps[-DIVERGED_STEPS:]
        above = min((record.loss for record in recent), default=-inf) > self._level + DIVERGED_RISE
        return self._level if above else None


def evaluation_is_due(history: History, training: TrainingSpec, total_steps: int) -> bool:
    """Return whether the held-out rows are looked at before the next step."""
    every, done = training.evaluate_every, len(history.steps)
    if every is None or done == 0 or (history.held_out and history.held_out[-1].step == done):
        return False
    # The last adapter takes part when the best is chosen.
    return done % every == 0 or (done == total_steps and training.keep == "best")


def is_finished(history: History, training: TrainingSpec, total_steps: int) -> bool:
    """Return whether nothing is left to do."""
    patience = training.early_stopping
    stopped = patience is not None and is_exhausted(history.held_out, patience)
    ended = stopped or len(history.steps) == total_steps
    return ended and not evaluation_is_due(history, training, total_steps)


def best_of(records: Sequence[HeldOutRecord]) -> HeldOutRecord | None:
    """Return the record with the lowest loss; the earlier of two that are equal."""
    return min(records, key=lambda record: record.loss, default=None)


def is_exhausted(records: Sequence[HeldOutRecord], patience: EarlyStoppingSpec) -> bool:
    """Return whether the loss has not become lower by more than minDelta in `patience` looks."""
    best, idle = inf, 0
    for record in records:
        better = record.loss < best - patience.min_delta
        best, idle = (record.loss, 0) if better else (best, idle + 1)
    return idle >= patience.patience


def kept_step(history: History, training: TrainingSpec) -> int:
    """Return the step whose adapter is the result."""
    best = best_of(history.held_out) if training.keep == "best" else None
    return best.step if best else len(history.steps)
