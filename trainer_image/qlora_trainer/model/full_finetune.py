"""Method full: trains every weight in fp32 and publishes the model; checks that it fits into memory."""

import json
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoConfig

from qlora_api.foreign_files import read_object
from qlora_api.model_config import MAX_CONFIG_BYTES
from qlora_api.reasons import Reason
from qlora_api.units import format_gib
from qlora_trainer.errors import RunError
from qlora_trainer.model.generation_config import save_model
from qlora_trainer.model.hardware import Hardware
from qlora_trainer.model.optimizer import OptimizerKind, choose_optimizer

MAX_PARAMETERS: Final = 20_000_000_000
"""Most weights that fit on one GPU: 8 bytes each, with paged state, are 160 GB; a B200 has 192 GB."""
_REPLICATED_BYTES_PER_WEIGHT: Final = 4
"""Bytes of a weight in fp32, and of its gradient."""
_SHARDED_BYTES_PER_WEIGHT: Final = 4 + 4
"""Bytes per weight that ZeRO-2 shards besides the optimizer state: the gradient and a copy of the weight."""
_USABLE_MEMORY_SHARE: Final = 0.8
"""Fraction of the free memory for weights, gradients and optimizer state; the rest is for activations."""


def check_parameter_limit(name: str, parameters: int) -> None:
    """Raise InvalidSpec if the model is too large for full fine-tuning on any GPU, before one is allocated."""
    if parameters > MAX_PARAMETERS:
        raise RunError(
            Reason.INVALID_SPEC,
            f"spec.method: {name} has {parameters:,} weights, and method full supports {MAX_PARAMETERS:,} at most; "
            "use qlora or lora",
        )


def choose_full_finetune_optimizer(
    requested: str, hardware: Hardware, parameters: int, parts: int = 1
) -> tuple[OptimizerKind, str]:
    """Return the optimizer and the reason: with fp32 state if that fits or is sharded, otherwise with 8-bit state."""
    kind, reason = choose_optimizer(requested, hardware.device)
    if requested == "auto":
        reason = "its fp32 state fits"
        if parts == 1 and not _fits(kind, hardware, parameters):
            kind, reason = OptimizerKind.ADAMW_8BIT, "with fp32 state the model would not fit"
    if not _fits(kind, hardware, parameters, parts):
        needed = format_gib(training_state_bytes(kind, parameters, parts))
        raise RunError(
            Reason.INVALID_SPEC,
            f"spec.method: full needs {needed} for {parameters:,} weights with {kind}, more than "
            f"{_USABLE_MEMORY_SHARE:.0%} of the {format_gib(hardware.free_bytes)} that are free; use lora or qlora, or "
            "a larger device",
        )
    return (
        kind,
        f"{reason}; weights, gradients and state take {format_gib(training_state_bytes(kind, parameters, parts))}",
    )


def training_state_bytes(kind: OptimizerKind, parameters: int, parts: int = 1) -> int:
    """Return the bytes of weights, gradients and optimizer state per device; ZeRO-2 shards over `parts` devices."""
    state = kind.optimizer.state_bytes_per_weight
    if parts > 1:
        return parameters * _REPLICATED_BYTES_PER_WEIGHT + parameters * (_SHARDED_BYTES_PER_WEIGHT + state) // parts
    return parameters * (_REPLICATED_BYTES_PER_WEIGHT + _REPLICATED_BYTES_PER_WEIGHT + state)


def _fits(kind: OptimizerKind, hardware: Hardware, parameters: int, parts: int = 1) -> bool:
    return training_state_bytes(kind, parameters, parts) <= _USABLE_MEMORY_SHARE * hardware.free_bytes


def save_full_model(model: Any, uri: str, target: Path) -> None:
    """Save the model in the dtype of the base, with the base's URI instead of a local path in config.json."""
    stored = AutoConfig.from_pretrained(model.name_or_path, trust_remote_code=False).dtype
    save_model(model.to(stored or torch.float32), target)
    config = target / "config.json"
    content = read_object(config, MAX_CONFIG_BYTES)
    config.write_text(json.dumps(content | {"_name_or_path": uri.removeprefix("hf://")}, indent=2, sort_keys=True))
