"""Settings that hardware and model decide, each with its reason for the log and the report."""

from dataclasses import dataclass, replace
from typing import Any, Final

import torch

from qlora_api.precision import compute_dtype_of
from qlora_api.runconfig import RunConfig
from qlora_api.strategies import STRATEGIES
from qlora_api.units import format_gib
from qlora_trainer.data.batching import MAX_PACKED_TOKENS
from qlora_trainer.model.attention import attention_facts, choose_attention
from qlora_trainer.model.full_finetune import choose_full_finetune_optimizer, training_state_bytes
from qlora_trainer.model.hardware import Hardware
from qlora_trainer.model.optimizer import OptimizerKind, choose_optimizer

ACTIVATION_BYTES_PER_TOKEN_LAYER_WIDTH: Final = 34
"""Activations saved for backward without checkpointing, per token, layer and hidden unit, in 16 bits
(Korthikanti et al. 2022)."""
INIT_DESCRIPTIONS: Final = {
    "default": "the adapter changes nothing yet",
    "gaussian": "the adapter changes nothing yet",
    "pissa": "the base's largest singular vectors; published for the base as it is, with twice the rank",
    "loftq": "corrects the quantization error of the base; use it on the same 4-bit base only",
}
"""What spec.lora.init means for users of the adapter."""
_SHARE_FOR_ACTIVATIONS: Final = 0.5
"""Fraction of the free memory for activations; the rest is for weights, optimizer and a margin."""


@dataclass(frozen=True)
class RuntimeSettings:
    """The settings; `reasons` has one phrase for each."""

    dtype: torch.dtype
    attention: str
    gradient_checkpointing: bool
    packing: bool
    optimizer: OptimizerKind
    reasons: dict[str, str]

    @property
    def dtype_name(self) -> str:
        """Return torch.bfloat16 as 'bfloat16'."""
        return _name_of(self.dtype)

    def without_packing(self, reason: str) -> "RuntimeSettings":
        """Return the settings for a model that does not support packing."""
        return replace(self, packing=False, reasons=self.reasons | {"packing": f"off: {reason}"})

    def with_gradient_checkpointing(self, reason: str) -> "RuntimeSettings":
        """Return the settings for a process that another one needs to recompute activations with it."""
        return replace(self, gradient_checkpointing=True, reasons=self.reasons | {"gradient checkpointing": reason})

    def without_gradient_checkpointing(self, reason: str) -> "RuntimeSettings":
        """Return the settings for a model that cannot recompute its activations."""
        return replace(self, gradient_checkpointing=False, reasons=self.reasons | {"gradient checkpointing": reason})


def resolve_runtime_settings(config: RunConfig, hardware: Hardware, model: Any) -> RuntimeSettings:
    """Resolve all settings from the model's configuration, before its weights are loaded."""
    spec, plan = config.spec, config.plan
    dtype, dtype_reason = compute_dtype(hardware, model.model_type)
    attention, attention_reason = choose_attention(attention_facts(model), hardware)
    length = min(config.prepared.dataset.longest_row_tokens, spec.training.max_length)
    tokens = min(plan.micro_batch_size * length, max(MAX_PACKED_TOKENS, length) if spec.training.packing else 1 << 62)
    requested, weights = spec.training.optimizer, config.prepared.model.parameters
    if spec.method == "full":
        parts = plan.processes if STRATEGIES[plan.strategy].shards_optimizer else 1
        optimizer, optimizer_reason = choose_full_finetune_optimizer(requested, hardware, weights, parts)
        hardware = replace(hardware, free_bytes=hardware.free_bytes - training_state_bytes(optimizer, weights, parts))
    else:
        optimizer, optimizer_reason = choose_optimizer(requested, hardware.device)
    checkpointing, checkpointing_reason = (
        choose_gradient_checkpointing(hardware, model, tokens)
        if plan.gradient_checkpointing is None
        else (plan.gradient_checkpointing, "the plan, from the model's shape, the rows and the GPU's memory")
    )
    return RuntimeSettings(
        dtype=dtype,
        attention=attention,
        gradient_checkpointing=checkpointing,
        packing=spec.training.packing,
        optimizer=optimizer,
        reasons={
            "device": hardware.name,
            "dtype": f"{_name_of(dtype)}: {dtype_reason}",
            "attention": f"{attention}: {attention_reason}",
            "gradient checkpointing": f"{'on' if checkpointing else 'off'}: {checkpointing_reason}",
            "packing": "on: rows are packed without padding" if spec.training.packing else "off: spec.training.packing",
            "optimizer": f"{optimizer}: {optimizer_reason}",
            "start": "every weight as the base has it" if spec.method == "full" else INIT_DESCRIPTIONS[spec.lora.init],
        },
    )


def compute_dtype(hardware: Hardware, model_type: str) -> tuple[torch.dtype, str]:
    """Return the compute dtype of the base and the reason; adapters are always fp32."""
    if hardware.capability is not None:
        name, reason = compute_dtype_of(hardware.capability, model_type)
        return getattr(torch, name), reason
    if hardware.native_bf16:
        return torch.bfloat16, "the CPU has AVX512-BF16, which is about twice as fast as fp32"
    return torch.float32, "the CPU has no native bf16"


def choose_gradient_checkpointing(hardware: Hardware, model: Any, tokens: int) -> tuple[bool, str]:
    """Return whether to recompute activations, and the reason: only if they do not fit, as it costs a forward pass."""
    needed = tokens * model.num_hidden_layers * model.hidden_size * ACTIVATION_BYTES_PER_TOKEN_LAYER_WIDTH
    available = round(hardware.free_bytes * _SHARE_FOR_ACTIVATIONS)
    fits = needed <= available
    reason = (
        f"{tokens} tokens need about {format_gib(needed)} of activations, and half of the free memory is "
        f"{format_gib(available)}"
    )
    return not fits, reason


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
