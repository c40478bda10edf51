"""AdamW variants: torch's, and those of bitsandbytes with 8-bit or paged state."""

from collections.abc import Sequence
from enum import StrEnum
from typing import Any, Final

import bitsandbytes
import torch

from qlora_api.optimizers import ADAMW, OPTIMIZERS, Optimizer
from qlora_api.v1alpha1 import TrainingSpec


class OptimizerKind(StrEnum):
    """Implementation of an optimizer; torch's AdamW has a fused one as well."""

    ADAMW = "adamw"
    ADAMW_FUSED = "adamw_fused"
    ADAMW_8BIT = "adamw8bit"
    PAGED_ADAMW = "pagedAdamw"
    PAGED_ADAMW_8BIT = "pagedAdamw8bit"

    @property
    def optimizer(self) -> Optimizer:
        """Return the optimizer that this kind implements."""
        return OPTIMIZERS[ADAMW.name if self is OptimizerKind.ADAMW_FUSED else self.value]


_BITSANDBYTES: Final[dict[OptimizerKind, Any]] = {
    OptimizerKind.ADAMW_8BIT: bitsandbytes.optim.AdamW8bit,
    OptimizerKind.PAGED_ADAMW: bitsandbytes.optim.PagedAdamW,
    OptimizerKind.PAGED_ADAMW_8BIT: bitsandbytes.optim.PagedAdamW8bit,
}


def choose_optimizer(requested: str, device: str) -> tuple[OptimizerKind, str]:
    """Return the optimizer for spec.training.optimizer on a device, and the reason."""
    plain = OptimizerKind.ADAMW if device == "cpu" else OptimizerKind.ADAMW_FUSED
    if requested == "auto":
        return plain, "an adapter's state is small, so 8-bit state would save little"
    optimizer = OPTIMIZERS[requested]
    if device == "cpu" and optimizer.paged_form_of:
        return OptimizerKind(optimizer.paged_form_of), f"{requested} without pages: its state is in host memory anyway"
    return plain if optimizer == ADAMW else OptimizerKind(optimizer.name), "spec.training.optimizer"


def make_optimizer(
    parameters: Sequence[torch.nn.Parameter], training: TrainingSpec, kind: OptimizerKind
) -> torch.optim.Optimizer:
    """Return an optimizer with new state."""
    groups, rate = parameter_groups(parameters, training.weight_decay), training.learning_rate
    if kind in _BITSANDBYTES:
        optimizer: torch.optim.Optimizer = _BITSANDBYTES[kind](groups, lr=rate)
        return optimizer
    return torch.optim.AdamW(groups, lr=rate, fused=kind == OptimizerKind.ADAMW_FUSED)


def parameter_groups(parameters: Sequence[torch.nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Return parameter groups with weight decay for matrices only, not for norms, biases and DoRA magnitudes."""
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters if parameter.ndim < 2]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
