"""LoftQ: initializes the adapter with the best low-rank correction of the base's 4-bit quantization error.

PEFT's replace_lora_weights_loftq needs a CUDA device and ignores the adapter's scale, so it overcorrects if alpha
differs from the rank. The computation is one SVD per module.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from bitsandbytes.functional import dequantize_4bit
from peft.tuners.lora import Linear4bit
from safetensors import safe_open

from qlora_api.reasons import Reason
from qlora_trainer.errors import RunError
from qlora_trainer.model.model_files import SHARD_INDEX, load_shard_index

ADAPTER_NAME: Final = "default"
_ITERATIONS: Final = 16
"""Iterations of the randomized SVD; its error is then far below the error of the low rank."""


@torch.no_grad()
def init_from_quantization_error(peft: Any, folder: Path) -> None:
    """Initialize every adapter so that 4-bit weight plus adapter is as close to the original weight as possible."""
    files = _files_of_weights(folder)
    for name, module in _adapted(peft.get_base_model()):
        weight = module.weight
        original = read_weight(files, f"{name}.weight").to(weight.device, torch.float32)
        quantization_error = original - dequantize_4bit(weight.data, weight.quant_state).float()
        up, down = low_rank_factors(quantization_error / module.scaling[ADAPTER_NAME], module.r[ADAPTER_NAME])
        module.lora_A[ADAPTER_NAME].weight.data = down
        module.lora_B[ADAPTER_NAME].weight.data = up


def low_rank_factors(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return factors [rows, rank] and [rank, columns] of the best rank-k approximation of a matrix [rows, columns].

    Each factor is scaled by the square roots of the singular values.
    """
    left, values, right = torch.svd_lowrank(matrix, rank, niter=_ITERATIONS)
    root = values.sqrt()
    return (left * root).contiguous(), (right * root).T.contiguous()


def _adapted(model: Any) -> Iterator[tuple[str, Linear4bit]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Linear4bit))


def _files_of_weights(folder: Path) -> Mapping[str, Path]:
    """Return the safetensors file of each weight in a model folder."""
    index = folder / SHARD_INDEX
    if index.is_file():
        return load_shard_index(index)
    only = folder / "model.safetensors"
    with safe_open(only, framework="pt") as opened:
        return dict.fromkeys(opened.keys(), only)


def read_weight(files: Mapping[str, Path], name: str) -> torch.Tensor:
    """Read a weight by name; some checkpoints omit the first component of the name."""
    stored = name if name in files else name.partition(".")[2]
    if stored not in files:
        raise RunError(
            Reason.MODEL_UNSUPPORTED,
            f"spec.lora.init: the model's files store {name} under another name, so loftq cannot compare it with its "
            "4-bit form; use another init",
        )
    with safe_open(files[stored], framework="pt") as opened:
        weight: torch.Tensor = opened.get_tensor(stored)
    return weight
