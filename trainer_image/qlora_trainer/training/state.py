"""Training history and state; decisions depend on nothing else, so a resumed run decides like an uninterrupted one."""

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
"""Consecutive steps that must be above the level; a spike that gradient clipping absorbs ends after a few."""
DIVERGED_RISE: Final = 1.5
"""Nats per token above the level: 4.5 times its perplexity."""


class History:
    """All steps and validations so far; append-only.

    Aggregates are updated incrementally, so the cost of a step does not depend on the number of earlier ones.
    """

    def __init__(self, steps: Iterable[StepRecord] = (), validations: Iterable[ValidationRecord] = ()) -> None:
        self.steps: list[StepRecord] = []
        self.validations: list[ValidationRecord] = list(validations)
        self._level = inf
        for record in steps:
            self.add_step(record)

    def add_step(self, record: StepRecord) -> None:
        """Append a step."""
        self.steps.append(record)
        done = len(self.steps)
        if done >= 2 * DIVERGED_STEPS and done % DIVERGED_STEPS == 0:
            block = self.steps[done - 2 * DIVERGED_STEPS : done - DIVERGED_STEPS]
            self._level = min(self._level, median(record.loss for record in block))

    def add_validation(self, record: ValidationRecord) -> None:
        """Append a validation."""
        self.validations.append(record)

    def copy(self) -> "History":
        """Return a copy."""
        return History(self.steps, self.validations)

    def level_before_divergence(self) -> float | None:
        """Return the level before the loss diverged, in nats per token; None if it has not diverged.

        The level is the lowest median over blocks of DIVERGED_STEPS steps, without the newest DIVERGED_STEPS steps.
        Normal noise does not reach the limit: even if a batch is a single row and losses deviate by one nat from a
        steady mean, the lowest of a thousand medians is 0.9 below the mean, so that one step is above the limit with
        probability 0.28, and twenty in a row with 8e-12. A loss that rises and recovers within twenty steps does not
        end the run, and neither does one that was never low.
        """
        recent = self.steps[-DIVERGED_STEPS:]
        above = min((record.loss for record in recent), default=-inf) > self._level + DIVERGED_RISE
        return self._level if above else None


def evaluation_is_due(history: History, training: TrainingSpec, total_steps: int) -> bool:
    """Return whether a validation is due before the next step."""
    every, done = training.evaluate_every, len(history.steps)
    if every is None or done == 0 or (history.validations and history.validations[-1].step == done):
        return False
    # With keep=best the final weights are a candidate too.
    return done % every == 0 or (done == total_steps and training.keep == "best")


def is_finished(history: History, training: TrainingSpec, total_steps: int) -> bool:
    """Return whether training is done: all steps or early stopping, and no validation is due."""
    patience = training.early_stopping
    stopped = patience is not None and patience_is_exhausted(history.validations, patience)
    ended = stopped or len(history.steps) == total_steps
    return ended and not evaluation_is_due(history, training, total_steps)


def best_validation(records: Sequence[ValidationRecord]) -> ValidationRecord | None:
    """Return the validation with the lowest loss; the earliest one on ties."""
    return min(records, key=lambda record: record.loss, default=None)


def patience_is_exhausted(records: Sequence[ValidationRecord], patience: EarlyStoppingSpec) -> bool:
    """Return whether the loss has not improved by more than minDelta in the last `patience` validations."""
    best, stale = inf, 0
    for record in records:
        improved = record.loss < best - patience.min_delta
        best, stale = (record.loss, 0) if improved else (best, stale + 1)
    return stale >= patience.patience


def selected_step(history: History, training: TrainingSpec) -> int:
    """Return the step whose weights are published, counted from 1."""
    best = best_validation(history.validations) if training.keep == "best" else None
    return best.step if best else len(history.steps)


_PAGED_STATES: Final = frozenset({"state1", "state2"})
"""The moments in bitsandbytes' state of a weight; its other tensors are small."""
_NESTED: Final = "/"
"""Separator of nested keys in a flat name; bitsandbytes nests its 8-bit states one level deeper."""

Weights = Mapping[str, torch.Tensor]
"""The adapter's weights, by name."""
FlatState = dict[str, torch.Tensor | float | int | bool | None]


@dataclass(frozen=True)
class TrainingState:
    """Everything that the next step depends on."""

    history: History
    weights: Weights
    optimizer: FlatState
    """Flat optimizer state per weight; its hyperparameters come from the schedule."""
    scaler: Mapping[str, float]
    """State of the fp16 loss scaler; empty if the loss is not scaled."""
    best: Weights
    """The adapter's weights at the lowest validation loss; empty with keep=last."""
    peak_memory_bytes: int = 0
    """Peak of the saving process, for the report only, which shows the maximum over all attempts."""

    @property
    def step(self) -> int:
        """Return the number of steps done."""
        return len(self.history.steps)


def copy_weights(trainable: TrainableModel) -> dict[str, torch.Tensor]:
    """Return a copy of the adapter's weights by name, on the CPU."""
    return {name: weight.detach().cpu().clone() for name, weight in trainable.named_parameters()}


@torch.no_grad()
def load_weights(trainable: TrainableModel, weights: Weights) -> None:
    """Copy these weights into the adapter."""
    own = dict(trainable.named_parameters())
    for name, weight in weights.items():
        own[name].copy_(weight)


def copy_optimizer(optimizer: torch.optim.Optimizer) -> FlatState:
    """Return a flat copy of the optimizer state, on the CPU."""
    return dict(flatten(optimizer.state_dict()["state"]))


def load_optimizer(optimizer: torch.optim.Optimizer, state: FlatState) -> None:
    """Load a flat state into a fresh optimizer, which keeps its own hyperparameters."""
    found: dict[str, Any] = {"state": unflatten(state), "param_groups": optimizer.state_dict()["param_groups"]}
    if getattr(optimizer, "is_paged", False):
        _load_paged(optimizer, found)
    else:
        optimizer.load_state_dict(found)


@torch.no_grad()
def _load_paged(optimizer: Any, found: dict[str, Any]) -> None:
    """Load a state into pages: bitsandbytes itself loads it into the memory of the GPU, which may be too small."""
    optimizer.load_state_dict(found, move_to_device=False)
    for parameter, own in optimizer.state.items():
        for name, value in own.items():
            if name in _PAGED_STATES:
                pages = optimizer.get_state_buffer(parameter, dtype=value.dtype)
                own[name] = pages.copy_(value)
            elif isinstance(value, torch.Tensor):
                own[name] = value.to(parameter.device)


def flatten(state: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield copies of all values, on the CPU, each named by its path."""
    for key, value in state.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}{_NESTED}")
        else:
            # Cloned: the next step writes into it, and bitsandbytes shares one table between weights.
            yield f"{prefix}{key}", value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value


def unflatten(flat: FlatState) -> dict[int, Any]:
    """Return the nested form; the first level is the index of the weight."""
    state: dict[int, Any] = {}
    for name, value in flat.items():
        number, *path, last = name.split(_NESTED)
        level = state.setdefault(int(number), {})
        for key in path:
            level = level.setdefault(key, {})
        level[last] = value
    return state
