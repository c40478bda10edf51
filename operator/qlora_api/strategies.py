"""How several processes share a run: one row for each strategy, and no other place that tells them apart by name."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

SharingName = Literal["ddp", "zero2", "zero3"]
"""Strategies for several processes."""
StrategyName = Literal["single", SharingName]
Distribution = Literal["auto", SharingName]
"""What spec.distribution may be: one by its name, or the plan's choice."""


@dataclass(frozen=True)
class Strategy:
    """A way to share the work, by what it does rather than by its name."""

    name: StrategyName
    summary: str
    """What it is, for the field's description."""
    chosen_because: str
    """Why a plan takes it where spec.distribution is auto."""
    launcher: Literal["accelerate", "deepspeed"] = "accelerate"
    zero_stage: int = 0
    """What DeepSpeed divides: 2 is gradients and optimizer, 3 the weights as well."""
    shards_optimizer: bool = False
    """Each process has its part of the gradients and of the optimizer's state."""
    shards_weights: bool = False
    """No process has a whole weight between two passes."""
    collective_backward: bool = False
    """Every backward pass is made by all processes at once: gradients are added up in it."""
    collective_forward: bool = False
    """Forward passes are too: each layer's weights are collected from all processes."""


SINGLE: Final = Strategy("single", summary="one process", chosen_because="there is one process")
DDP: Final = Strategy(
    "ddp",
    summary="each holds the whole model",
    chosen_because="the model fits each GPU, so that dividing it would only cost time",
)
ZERO2: Final = Strategy(
    "zero2",
    summary="optimizer and gradients are divided (DeepSpeed)",
    chosen_because="gradients and optimizer fit only if they are divided",
    launcher="deepspeed",
    zero_stage=2,
    shards_optimizer=True,
    collective_backward=True,
)
ZERO3: Final = Strategy(
    "zero3",
    summary="the weights as well, once they are loaded",
    chosen_because="the weights fit only if they are divided as well",
    launcher="deepspeed",
    zero_stage=3,
    shards_optimizer=True,
    shards_weights=True,
    collective_backward=True,
    collective_forward=True,
)
FOR_SEVERAL: Final = (DDP, ZERO2, ZERO3)
"""Strategies for several processes; what divides least, and so costs least time, comes first."""
STRATEGIES: Final[Mapping[str, Strategy]] = {strategy.name: strategy for strategy in (SINGLE, *FOR_SEVERAL)}
SHARDING_OPTIMIZER: Final = tuple(strategy.name for strategy in FOR_SEVERAL if strategy.shards_optimizer)
SHARDING_WEIGHTS: Final = tuple(strategy.name for strategy in FOR_SEVERAL if strategy.shards_weights)
