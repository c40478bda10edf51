"""Optimizers that a manifest can name, one row each, with the size of their state."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Final, Literal

OptimizerName = Literal["adamw", "adamw8bit", "pagedAdamw", "pagedAdamw8bit"]
AskedOptimizer = Literal["auto", OptimizerName]
"""Values of spec.training.optimizer; auto: the plan and the trainer choose."""

_FP32: Final = 4
"""Bytes per element."""
BLOCK_8BIT_STATE: Final = 256
"""Elements of 8-bit optimizer state per fp32 scale (bitsandbytes 0.50, optim/optimizer.py)."""
LEAST_8BIT_STATE: Final = 4096
"""Elements from which a tensor has 8-bit state; smaller ones have fp32 state (same file: min_8bit_size)."""
LEAST_PAGED_STATE: Final = 100_000
"""Elements from which a tensor has paged state; smaller ones stay on the GPU (same file: get_state_buffer)."""
MOMENTS: Final = 2
"""Adam's moving averages: of the gradient and of its square."""


@dataclass(frozen=True)
class Optimizer:
    """A variant of AdamW: the size of its state, and whether that can be paged or sharded."""

    name: OptimizerName
    moments: int = MOMENTS
    """Elements of state per weight."""
    state_bits: Literal[8, 32] = 32
    """Bits per element of state."""
    paged_form_of: OptimizerName | None = None
    """The optimizer with the same state, unpaged; None: this one is not paged."""
    can_be_sharded: bool = False
    """DeepSpeed can shard its state: fp32 AdamW only."""

    @property
    def paged(self) -> bool:
        """Return whether its state moves to host memory when GPU memory runs out."""
        return self.paged_form_of is not None

    def state_bytes(self, size: int) -> int:
        """Return the bytes of state on the GPU of a tensor with `size` elements."""
        paged = self.paged and size >= LEAST_PAGED_STATE
        if self.state_bits == 8 and size >= LEAST_8BIT_STATE:
            return self.moments * ((0 if paged else size) + ceil(size / BLOCK_8BIT_STATE) * _FP32)
        return 0 if paged else self.moments * size * _FP32

    @property
    def state_bytes_per_weight(self) -> int:
        """Return the bytes of state on the GPU per weight of a large model; the scales are negligible."""
        return 0 if self.paged else self.moments * self.state_bits // 8


ADAMW: Final = Optimizer("adamw", can_be_sharded=True)
ADAMW_8BIT: Final = Optimizer("adamw8bit", state_bits=8)
_ALL: Final = (
    ADAMW,
    ADAMW_8BIT,
    Optimizer("pagedAdamw", paged_form_of="adamw"),
    Optimizer("pagedAdamw8bit", state_bits=8, paged_form_of="adamw8bit"),
)
OPTIMIZERS: Final[Mapping[str, Optimizer]] = {optimizer.name: optimizer for optimizer in _ALL}
SUMMARY: Final = "AdamW with fp32 or 8-bit state; paged state moves to host memory when GPU memory runs out."
"""Part of the description of spec.training.optimizer."""
SHARDABLE: Final = tuple(optimizer.name for optimizer in _ALL if optimizer.can_be_sharded)
