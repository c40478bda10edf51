"""What happened in a training so far, and what follows from that alone, so that a resumed run decides as any other."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from statistics import median
from typing import Any, Final

import torch

from qlora_api.report import StepRecord, ValidationRecord
from qlora_api.v1alpha1 import EarlyStoppingSpec, TrainingSpec
from qlora_trainer.model.base_model import TrainableModel

DIVERGED_STEPS: Final = 20
"""Steps in a row that must be above the level: a spike that clips itself away is over after a few."""
DIVERGED_RISE: Final = 1.5
"""Nats per token above the level, which is 4.5 times its perplexity."""


class History:
    """The steps that were taken, and the looks at the held-out rows between them; it only grows.

    What follows from all of it is kept up to date, so that a step costs the same however many were before it.
    """

    def __init__(self, steps: Iterable[StepRecord] = (), validations: Iterable[ValidationRecord] = ()) -> None:
        self.steps: list[StepRecord] = []
        self.validations: list[ValidationRecord] = list(validations)
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

    def add_validation(self, record: ValidationRecord) -> None:
        """Note a look at the held-out rows."""
        self.validations.append(record)

    def copy(self) -> "History":
        """Return the history as it is now."""
        return History(self.steps, self.validations)

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
    if every is None or done == 0 or (history.validations and history.validations[-1].step == done):
        return False
    # The last adapter takes part when the best is chosen.
    return done % every == 0 or (done == total_steps and training.keep == "best")


def is_finished(history: History, training: TrainingSpec, total_steps: int) -> bool:
    """Return whether nothing is left to do."""
    patience = training.early_stopping
    stopped = patience is not None and patience_is_exhausted(history.validations, patience)
    ended = stopped or len(history.steps) == total_steps
    return ended and not evaluation_is_due(history, training, total_steps)


def best_validation(records: Sequence[ValidationRecord]) -> ValidationRecord | None:
    """Return the record with the lowest loss; the earlier of two that are equal."""
    return min(records, key=lambda record: record.loss, default=None)


def patience_is_exhausted(records: Sequence[ValidationRecord], patience: EarlyStoppingSpec) -> bool:
    """Return whether the loss has not become lower by more than minDelta in `patience` looks."""
    best, idle = inf, 0
    for record in records:
        better = record.loss < best - patience.min_delta
        best, idle = (record.loss, 0) if better else (best, idle + 1)
    return idle >= patience.patience


def selected_step(history: History, training: TrainingSpec) -> int:
    """Return the step whose adapter is the result."""
    best = best_validation(history.validations) if training.keep == "best" else None
    return best.step if best else len(history.steps)


_NESTED: Final = "/"
"""Separates the levels of an optimizer's state in a flat name; bitsandbytes nests its 8-bit states one deeper."""

Weights = Mapping[str, torch.Tensor]
"""The adapter's weights, by name."""
FlatState = dict[str, torch.Tensor | float | int | bool | None]


@dataclass(frozen=True)
class TrainingState:
    """A run between two steps."""

    history: History
    weights: Weights
    optimizer: FlatState
    """The optimizer's state of each weight, flat; its settings are the schedule's."""
    scaler: Mapping[str, float]
    """The fp16 loss scaler's; empty where nothing is scaled."""
    best: Weights
    """The adapter's weights at the lowest held-out loss; empty where the last ones are kept."""
    peak_memory_bytes: int = 0
    """Of the process that came here; it decides nothing, and the report shows the highest of all attempts."""

    @property
    def step(self) -> int:
        """Return how many steps were done."""
        return len(self.history.steps)


def copy_weights(trainable: TrainableModel) -> dict[str, torch.Tensor]:
    """Return a copy of the adapter's weights, by name."""
    return {name: weight.detach().cpu().clone() for name, weight in trainable.named_parameters()}


@torch.no_grad()
def load_weights(trainable: TrainableModel, weights: Weights) -> None:
    """Give the adapter these weights."""
    own = dict(trainable.named_parameters())
    for name, weight in weights.items():
        own[name].copy_(weight)


def copy_optimizer(optimizer: torch.optim.Optimizer) -> FlatState:
    """Return a copy of the optimizer's state."""
    return dict(flatten(optimizer.state_dict()["state"]))


def load_optimizer(optimizer: torch.optim.Optimizer, state: FlatState) -> None:
    """Give a fresh optimizer this state; its settings stay its own."""
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": unflatten(state), "param_groups": groups})


def flatten(state: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield copies of all values, on the CPU, each with the path to it as its name."""
    for key, value in state.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}{_NESTED}")
        else:
            # Cloned, because the next step writes into it, and because bitsandbytes shares one table among weights.
            yield f"{prefix}{key}", value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value


def unflatten(flat: FlatState) -> dict[int, Any]:
    """Return the nested form; the first level is the weight's number."""
    state: dict[int, Any] = {}
    for name, value in flat.items():
        number, *path, last = name.split(_NESTED)
        level = state.setdefault(int(number), {})
        for key in path:
            level = level.setdefault(key, {})
        level[last] = value
    return state
