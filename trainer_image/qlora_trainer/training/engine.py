"""Forward, backward and optimizer step: with all-reduced gradients, or sharded by DeepSpeed (ZeRO-2 and ZeRO-3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol

import torch
from torch.nn import Module

from qlora_api.launcher_config import deepspeed_config
from qlora_api.reasons import Reason
from qlora_api.strategies import DDP
from qlora_api.v1alpha1 import TrainingSpec
from qlora_trainer.data.batching import Batch
from qlora_trainer.distributed.world import World
from qlora_trainer.errors import RunError
from qlora_trainer.model.base_model import TrainableModel
from qlora_trainer.model.optimizer import OptimizerKind, make_optimizer
from qlora_trainer.model.runtime_settings import RuntimeSettings
from qlora_trainer.training.state import (
    FlatState,
    TrainingState,
    Weights,
    copy_optimizer,
    copy_weights,
    flatten,
    load_optimizer,
    load_weights,
    unflatten,
)

_RANK_SEPARATOR: Final = ":"
"""Follows the rank in the names of a sharded optimizer state."""


class Engine(Protocol):
    """Accumulates gradients and takes optimizer steps; all ranks make the same calls in the same order."""

    def initialize(self, state: TrainingState | None) -> None:
        """Prepare for the first step, or for the step after `state`."""

    def backward(self, batch: Batch, weight: float, *, last: bool) -> float:
        """Run forward and backward on a micro-batch and accumulate its gradients.

        The graph is freed before this returns: a variable that held it would keep the inputs of checkpointed layers,
        and every activation of bitsandbytes' 8-bit layers, in memory during the next micro-batch.

        Args:
            batch: The micro-batch.
            weight: Factor of the loss in the gradients: 1 / labels of the global batch, or 0 for padding.
            last: Whether this is the step's last micro-batch.

        Returns:
            The summed, unweighted loss over the batch's labels, in nats.

        """

    def gradients(self) -> Mapping[str, torch.Tensor | None]:
        """Return the gradient of each trainable weight by name; valid after the last backward, before the step."""

    def optimizer_step(self, rate: float) -> float:
        """Clip the gradients, step, and zero them.

        Args:
            rate: Learning rate of this step.

        Returns:
            The gradient norm before clipping.

        """

    def weights(self) -> Weights:
        """Return a copy of the trainable weights by name, unsharded, on the CPU."""

    def load_weights(self, weights: Weights) -> None:
        """Replace the model's weights, after the last step."""

    def optimizer_state(self) -> FlatState:
        """Return a copy of the optimizer state on the CPU; if it is sharded, with the shards of all ranks on rank 0."""

    def scaler_state(self) -> Mapping[str, float]:
        """Return the state of the fp16 loss scaler; empty if the loss is not scaled."""


class LocalEngine:
    """Nothing is sharded; gradients are all-reduced once per step."""

    def __init__(
        self, trainable: TrainableModel, training: TrainingSpec, settings: RuntimeSettings, world: World
    ) -> None:
        self._trainable = trainable
        self._world = world
        self._max_norm = training.max_grad_norm
        self._optimizer = make_optimizer(trainable.parameters(), training, settings.optimizer)
        # Only fp16 needs loss scaling; for other dtypes the scaler is disabled.
        self.scaler = torch.amp.GradScaler(trainable.device.type, enabled=settings.dtype == torch.float16)

    def initialize(self, state: TrainingState | None) -> None:
        """See Engine."""
        if state is None:
            return
        load_weights(self._trainable, state.weights)
        load_optimizer(self._optimizer, state.optimizer)
        if state.scaler:
            # JSON has one kind of number, and torch refuses a growth interval that is not an int.
            fresh = self.scaler.state_dict()
            self.scaler.load_state_dict({name: type(fresh[name])(value) for name, value in state.scaler.items()})

    def backward(self, batch: Batch, weight: float, *, last: bool) -> float:  # noqa: ARG002 (Engine's)
        """See Engine."""
        # Scaled before backward: small gradients of the logits would underflow in fp16 first.
        scaled = self.scaler.scale(torch.tensor(weight, device=self._trainable.device))
        loss = self._trainable.loss_sum(batch, scaled)
        torch.autograd.backward(loss)
        return float(loss.detach() / scaled)

    def gradients(self) -> Mapping[str, torch.Tensor | None]:
        """See Engine."""
        return {name: parameter.grad for name, parameter in self._trainable.named_parameters()}

    def optimizer_step(self, rate: float) -> float:
        """See Engine."""
        parameters = self._trainable.parameters()
        self._world.all_reduce_gradients(parameters)
        _set_learning_rate(self._optimizer, rate)
        self.scaler.unscale_(self._optimizer)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self._max_norm))
        if math.isfinite(norm):
            self.scaler.step(self._optimizer)
        self.scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def weights(self) -> Weights:
        """See Engine."""
        return copy_weights(self._trainable)

    def load_weights(self, weights: Weights) -> None:
        """See Engine."""
        load_weights(self._trainable, weights)

    def optimizer_state(self) -> FlatState:
        """See Engine."""
        return copy_optimizer(self._optimizer)

    def scaler_state(self) -> Mapping[str, float]:
        """See Engine."""
        return dict(self.scaler.state_dict())


class _DeepSpeedModule(Module):
    """The module that DeepSpeed wraps: it owns the weights, and forward computes whatever it is given."""

    def __init__(self, peft: Any) -> None:
        super().__init__()
        self.peft = peft

    def forward(self, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        return compute()


class DeepSpeedEngine:
    """DeepSpeed shards optimizer state and gradients over the ranks, and with ZeRO-3 the weights too."""

    def __init__(
        self, trainable: TrainableModel, training: TrainingSpec, settings: RuntimeSettings, world: World
    ) -> None:
        self._trainable = trainable
        self._training = training
        self._settings = settings
        self._world = world
        self._engine: Any = None

    def initialize(self, state: TrainingState | None) -> None:
        """See Engine; does nothing if the weights are sharded already."""
        if self._engine is not None:
            return
        import deepspeed  # noqa: PLC0415 (seconds, and only here)

        # Before sharding: afterwards no rank has the full weights.
        if state is not None:
            load_weights(self._trainable, state.weights)
        optimizer = make_optimizer(self._trainable.parameters(), self._training, self._settings.optimizer)
        # On a CPU DeepSpeed would compile its shared-memory operator, and the image has no compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self._engine, *_ = deepspeed.initialize(
            model=_DeepSpeedModule(self._trainable.wrapped),
            optimizer=optimizer,
            config=deepspeed_config(self._world.strategy, self._training.max_grad_norm),
            dist_init_required=False,
        )
        if state is not None:
            parts, found = (
                self._fp32_partitions(),
                unflatten(select_optimizer_partition(state.optimizer, self._world.rank)),
            )
            for number, moments in found.items():
                self._engine.optimizer.optimizer.state[parts[number]] = self._on_device(moments)

    def _on_device(self, moments: Mapping[str, Any]) -> dict[str, Any]:
        """Move the moments to the weights' device; the step count stays on the CPU unless the kernel is fused."""
        device, fused = self._trainable.device, self._settings.optimizer == OptimizerKind.ADAMW_FUSED
        return {name: value.to(device) if fused or value.ndim else value for name, value in moments.items()}

    def _fp32_partitions(self) -> Sequence[torch.Tensor]:
        """Return this rank's fp32 partitions, one per parameter group: what the wrapped optimizer updates.

        Its state_dict is no substitute: between two steps ZeRO-3 leaves its groups empty.
        """
        optimizer = self._engine.optimizer
        flat = optimizer.fp32_partitioned_groups_flat if self._world.sharing.shards_weights else None
        parts: Sequence[torch.Tensor] = flat or optimizer.single_partition_of_fp32_groups
        return parts

    def backward(self, batch: Batch, weight: float, *, last: bool) -> float:
        """See Engine."""
        # DeepSpeed averages over the ranks; the loss here is a sum.
        scaled = torch.tensor(weight * self._world.size, device=self._trainable.device)
        self._engine.set_gradient_accumulation_boundary(last)
        loss = self._engine(lambda: self._trainable.loss_sum(batch, scaled))
        self._engine.backward(loss)
        if not last:
            self._engine.step()
        return float(loss.detach() / scaled) if weight else 0.0

    def gradients(self) -> Mapping[str, torch.Tensor | None]:
        """See Engine."""
        from deepspeed.utils import safe_get_full_grad  # noqa: PLC0415 (as above)

        return {name: safe_get_full_grad(parameter) for name, parameter in self._trainable.named_parameters()}

    def optimizer_step(self, rate: float) -> float:
        """See Engine."""
        _set_learning_rate(self._engine.optimizer, rate)
        self._engine.step()
        return float(self._engine.get_global_grad_norm())

    def weights(self) -> Weights:
        """See Engine."""
        from deepspeed.utils import safe_get_full_fp32_param  # noqa: PLC0415 (as above)

        named = self._trainable.named_parameters()
        return {name: safe_get_full_fp32_param(parameter).detach().cpu().clone() for name, parameter in named}

    def load_weights(self, weights: Weights) -> None:
        """See Engine."""
        import deepspeed  # noqa: PLC0415 (as above)

        named, sharded = dict(self._trainable.named_parameters()), self._world.sharing.shards_weights
        for name, weight in weights.items():
            with deepspeed.zero.GatheredParameters([named[name]], modifier_rank=0, enabled=sharded), torch.no_grad():
                named[name].copy_(weight)

    def optimizer_state(self) -> FlatState:
        """See Engine."""
        state = self._engine.optimizer.optimizer.state
        mine = {number: state[part] for number, part in enumerate(self._fp32_partitions())}
        return merge_optimizer_partitions(self._world.gather(dict(flatten(mine))))

    def scaler_state(self) -> Mapping[str, float]:
        """See Engine."""
        return {}


def make_engine(trainable: TrainableModel, training: TrainingSpec, settings: RuntimeSettings, world: World) -> Engine:
    """Return the engine for the world's strategy, with fresh optimizer state.

    Raises:
        RunError: INVALID_SPEC if the strategy cannot compute in the device's dtype.

    """
    if world.sharing.launcher != "deepspeed":
        return LocalEngine(trainable, training, settings, world)
    if settings.dtype == torch.float16:
        raise RunError(
            Reason.INVALID_SPEC,
            f"spec.distribution {world.strategy} needs bf16 or fp32, and this device is fast in fp16 only; set it "
            f"to {DDP.name}, or choose a GPU of sm_80 or later",
        )
    return DeepSpeedEngine(trainable, training, settings, world)


def merge_optimizer_partitions(parts: Sequence[FlatState]) -> FlatState:
    """Merge the optimizer states of all ranks, prefixed by rank; an adapter's are megabytes, so one file is enough."""
    return {f"{rank}{_RANK_SEPARATOR}{name}": value for rank, part in enumerate(parts) for name, value in part.items()}


def select_optimizer_partition(merged: FlatState, rank: int) -> FlatState:
    """Return one rank's optimizer state from a merged one."""
    mine = f"{rank}{_RANK_SEPARATOR}"
    return {name.removeprefix(mine): value for name, value in merged.items() if name.startswith(mine)}


def _set_learning_rate(optimizer: Any, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
