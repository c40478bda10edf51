"""Distribution strategies, one row each; other modules check their properties, never their names."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

SharingName = Literal["ddp", "zero2", "zero3"]
"""Strategies for several processes."""
StrategyName = Literal["single", SharingName]
Distribution = Literal["auto", SharingName]
"""Values of spec.distribution; auto: the plan chooses."""


@dataclass(frozen=True)
class Strategy:
    """How training is distributed over processes."""

    name: StrategyName
    summary: str
    """Part of the description of spec.distribution."""
    chosen_because: str
    """Why a plan chooses it when spec.distribution is auto."""
    launcher: Literal["accelerate", "deepspeed"] = "accelerate"
    zero_stage: int = 0
    """DeepSpeed's ZeRO stage: 2 shards gradients and optimizer state, 3 the weights as well; 0: no DeepSpeed."""
    shards_optimizer: bool = False
    """Each process holds a shard of the gradients and of the optimizer state."""
    shards_weights: bool = False
    """Each process holds a shard of every weight between two forward passes."""
    collective_backward: bool = False
    """All processes must run the backward pass together: it reduces gradients."""
    collective_forward: bool = False
    """All processes must run the forward pass together: it all-gathers the weights of each layer."""


SINGLE: Final = Strategy("single", summary="one process", chosen_because="there is one process")
DDP: Final = Strategy(
    "ddp",
    summary="each holds the full model",
    chosen_because="the model fits each GPU, so sharding it would only cost time",
)
ZERO2: Final = Strategy(
    "zero2",
    summary="optimizer state and gradients are sharded (DeepSpeed)",
    chosen_because="gradients and optimizer state fit only if they are sharded",
    launcher="deepspeed",
    zero_stage=2,
    shards_optimizer=True,
    collective_backward=True,
)
ZERO3: Final = Strategy(
    "zero3",
    summary="weights as well, once they are loaded",
    chosen_because="the weights fit only if they are sharded as well",
    launcher="deepspeed",
    zero_stage=3,
    shards_optimizer=True,
    shards_weights=True,
    collective_backward=True,
    collective_forward=True,
)
FOR_SEVERAL: Final = (DDP, ZERO2, ZERO3)
"""Strategies for several processes, in the order in which a plan tries them: least sharding and communication first."""
STRATEGIES: Final[Mapping[str, Strategy]] = {strategy.name: strategy for strategy in (SINGLE, *FOR_SEVERAL)}
SHARDING_OPTIMIZER: Final = tuple(strategy.name for strategy in FOR_SEVERAL if strategy.shards_optimizer)
SHARDING_WEIGHTS: Final = tuple(strategy.name for strategy in FOR_SEVERAL if strategy.shards_weights)
