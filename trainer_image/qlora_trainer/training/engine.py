"""How gradients become a step: added up among the processes, or divided among them by DeepSpeed (ZeRO-2 and ZeRO-3)."""

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
"""Follows the number of the process in the names of a divided optimizer's state."""


class Engine(Protocol):
    """What takes gradients and makes steps; every call is made by all processes alike."""

    def initialize(self, state: TrainingState | None) -> None:
        """Get ready for the first step, or for the one after a state."""

    def backward(self, batch: Batch, weight: float, *, last: bool) -> float:
        """Add a batch's gradients, and return its summed loss; `last` says that the step's gradients are complete.

        The graph goes with this call. While a variable holds it, checkpoints hold their inputs and bitsandbytes' 8-bit
        layers all of theirs, beside those of the next micro-batch.
        """

    def gradients(self) -> Mapping[str, torch.Tensor | None]:
        """Return the gradient of each weight that learns, by name, between the last batch and the update."""

    def optimizer_step(self, rate: float) -> float:
        """Clip, step and clear; return the norm before clipping."""

    def weights(self) -> Weights:
        """Return a copy of the weights that learn, whole, by name."""

    def load_weights(self, weights: Weights) -> None:
        """Give the model other weights, after the last step."""

    def optimizer_state(self) -> FlatState:
        """Return a copy of the optimizer's state, of all processes where it is divided."""

    def scaler_state(self) -> Mapping[str, float]:
        """Return the state of the fp16 loss scaler; empty where nothing is scaled."""


class LocalEngine:
    """Each process has everything; gradients are added up once a step."""

    def __init__(
        self, trainable: TrainableModel, training: TrainingSpec, settings: RuntimeSettings, world: World
    ) -> None:
        self._trainable = trainable
        self._world = world
        self._max_norm = training.max_grad_norm
        self._optimizer = make_optimizer(trainable.parameters(), training, settings.optimizer)
        # Only fp16 needs its loss scaled; elsewhere the scaler passes everything through.
        self.scaler = torch.amp.GradScaler(trainable.device.type, enabled=settings.dtype == torch.float16)

    def initialize(self, state: TrainingState | None) -> None:
        """See Engine."""
        if state is None:
            return
        load_weights(self._trainable, state.weights)
        load_optimizer(self._optimizer, state.optimizer)
        if state.scaler:
            self.scaler.load_state_dict(dict(state.scaler))

    def backward(self, batch: Batch, weight: float, *, last: bool) -> float:  # noqa: ARG002 (Engine's)
        """See Engine."""
        # With fp16's scale from the start: small gradients of the logits would be lost before a later one.
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
    """The module that DeepSpeed drives: the weights of the model, and whatever is computed with them."""

    def __init__(self, peft: Any) -> None:
        super().__init__()
        self.peft = peft

    def forward(self, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        return compute()


class DeepSpeedEngine:
    """DeepSpeed divides optimizer state and gradients among the processes, and with ZeRO-3 every weight."""

    def __init__(
        self, trainable: TrainableModel, training: TrainingSpec, settings: RuntimeSettings, world: World
    ) -> None:
        self._trainable = trainable
        self._training = training
        self._settings = settings
        self._world = world
        self._engine: Any = None

    def initialize(self, state: TrainingState | None) -> None:
        """See Engine; what is divided already stays so."""
        if self._engine is not None:
            return
        import deepspeed  # noqa: PLC0415 (seconds, and only here)

        # Before the weights are divided: afterwards nobody has them whole.
        if state is not None:
            load_weights(self._trainable, state.weights)
        optimizer = make_optimizer(self._trainable.parameters(), self._training, self._settings.optimizer)
        # On a CPU it would compile an operator for processes of one host, and an image has no compiler.
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
        """Put moments where the weights are; the count of steps stays with the host unless the kernel is fused."""
        device, fused = self._trainable.device, self._settings.optimizer == OptimizerKind.ADAMW_FUSED
        return {name: value.to(device) if fused or value.ndim else value for name, value in moments.items()}

    def _fp32_partitions(self) -> Sequence[torch.Tensor]:
        """Return this process's parts of the weights in fp32, one per group: what the optimizer inside works on.

        Its state_dict would not do: between two steps ZeRO-3 leaves its groups empty.
        """
        divided = self._engine.optimizer
        flat = divided.fp32_partitioned_groups_flat if self._world.sharing.shards_weights else None
        parts: Sequence[torch.Tensor] = flat or divided.single_partition_of_fp32_groups
        return parts

    def backward(self, batch: Batch, weight: float, *, last: bool) -> float:
        """See Engine."""
        # DeepSpeed takes the mean over the processes, and ours is a sum.
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

        named, divided = dict(self._trainable.named_parameters()), self._world.sharing.shards_weights
        for name, weight in weights.items():
            with deepspeed.zero.GatheredParameters([named[name]], modifier_rank=0, enabled=divided), torch.no_grad():
                named[name].copy_(weight)

    def optimizer_state(self) -> FlatState:
        """See Engine."""
        state = self._engine.optimizer.optimizer.state
        mine = {number: state[part] for number, part in enumerate(self._fp32_partitions())}
        return merge_optimizer_partitions(self._world.all_gather(dict(flatten(mine))))

    def scaler_state(self) -> Mapping[str, float]:
        """See Engine."""
        return {}


def make_engine(trainable: TrainableModel, training: TrainingSpec, settings: RuntimeSettings, world: World) -> Engine:
    """Return the engine of the world's strategy, with fresh optimizer state."""
    if world.sharing.launcher != "deepspeed":
        return LocalEngine(trainable, training, settings, world)
    if settings.dtype == torch.float16:
        raise RunError(
            Reason.INVALID_SPEC,
            f"spec.distribution {world.strategy} computes in bf16 or fp32, and this device has fast fp16 only; set it "
            f"to {DDP.name}, or choose a GPU of sm_80 or later",
        )
    return DeepSpeedEngine(trainable, training, settings, world)


def merge_optimizer_partitions(parts: Sequence[FlatState]) -> FlatState:
    """Return the optimizer states of all processes as one; an adapter's are megabytes, so one file holds them all."""
    return {f"{rank}{_RANK_SEPARATOR}{name}": value for rank, part in enumerate(parts) for name, value in part.items()}


def select_optimizer_partition(joined: FlatState, rank: int) -> FlatState:
    """Return the optimizer state of one process."""
    mine = f"{rank}{_RANK_SEPARATOR}"
    return {name.removeprefix(mine): value for name, value in joined.items() if name.startswith(mine)}


def _set_learning_rate(optimizer: Any, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
