"""What the next step depends on, as one value: everything else about a step follows from the seed and its number."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch

from qlora_trainer.history import History
from qlora_trainer.model import Tuned

_NESTED: Final = "/"
"""Separates the levels of an optimizer's state in a flat name; bitsandbytes nests its 8-bit states one deeper."""

Weights = Mapping[str, torch.Tensor]
"""The adapter's weights, by name."""
Flat = dict[str, torch.Tensor | float | int | bool | None]


@dataclass(frozen=True)
class TrainingState:
    """A run between two steps."""

    history: History
    weights: Weights
    optimizer: Flat
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


def copy_weights(tuned: Tuned) -> dict[str, torch.Tensor]:
    """Return a copy of the adapter's weights, by name."""
    return {name: weight.detach().cpu().clone() for name, weight in tuned.named_parameters()}


@torch.no_grad()
def put_weights(tuned: Tuned, weights: Weights) -> None:
    """Give the adapter these weights."""
    own = dict(tuned.named_parameters())
    for name, weight in weights.items():
        own[name].copy_(weight)


def copy_optimizer(optimizer: torch.optim.Optimizer) -> Flat:
    """Return a copy of the optimizer's state."""
    return dict(flatten(optimizer.state_dict()["state"]))


def put_optimizer(optimizer: torch.optim.Optimizer, state: Flat) -> None:
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


def unflatten(flat: Flat) -> dict[int, Any]:
    """Return the nested form; the first level is the weight's number."""
    state: dict[int, Any] = {}
    for name, value in flat.items():
        number, *path, last = name.split(_NESTED)
        level = state.setdefault(int(number), {})
        for key in path:
            level = level.setdefault(key, {})
        level[last] = value
    return state
