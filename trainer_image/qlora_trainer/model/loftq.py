"""LoftQ: an adapter that starts as the best correction of what 4-bit quantisation took from the base.

peft's replace_lora_weights_loftq needs a CUDA device and leaves out the adapter's scale, so that with an alpha other
than the rank it corrects too much; the computation is one decomposition per module.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from bitsandbytes.functional import dequantize_4bit
from peft.tuners.lora import Linear4bit
from safetensors import safe_open

from qlora_api.reasons import Reason
from qlora_trainer.errors import RunError

ADAPTER_NAME: Final = "default"
_ITERATIONS: Final = 16
"""Of the randomised decomposition; its error is then far below that of the rank."""


@torch.no_grad()
def init_from_quantization_error(peft: Any, folder: Path) -> None:
    """Set every adapter so that 4-bit weight plus adapter comes as close to the original weight as its rank allows."""
    files = _files_of_weights(folder)
    for name, module in _adapted(peft.get_base_model()):
        weight = module.weight
        original = read_weight(files, f"{name}.weight").to(weight.device, torch.float32)
        lost = original - dequantize_4bit(weight.data, weight.quant_state).float()
        up, down = low_rank_factors(lost / module.scaling[ADAPTER_NAME], module.r[ADAPTER_NAME])
        module.lora_A[ADAPTER_NAME].weight.data = down
        module.lora_B[ADAPTER_NAME].weight.data = up


def low_rank_factors(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the two factors of the closest matrix of a rank, with its singular values shared between them."""
    left, values, right = torch.svd_lowrank(matrix, rank, niter=_ITERATIONS)
    root = values.sqrt()
    return (left * root).contiguous(), (right * root).T.contiguous()


def _adapted(model: Any) -> Iterator[tuple[str, Linear4bit]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Linear4bit))


def _files_of_weights(folder: Path) -> Mapping[str, Path]:
    """Return the file of each weight of a model's folder."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    only = folder / "model.safetensors"
    with safe_open(only, framework="pt") as opened:
        return dict.fromkeys(opened.keys(), only)


def read_weight(files: Mapping[str, Path], name: str) -> torch.Tensor:
    """Read one weight; some checkpoints leave out the first part of its name."""
    stored = name if name in files else name.partition(".")[2]
    if stored not in files:
        raise RunError(
            Reason.MODEL_UNSUPPORTED,
            f"spec.lora.init: the model's files store {name} under another name, so loftq cannot compare it with its "
            "4-bit form; leave init out",
        )
    with safe_open(files[stored], framework="pt") as opened:
        weight: torch.Tensor = opened.get_tensor(stored)
    return weight
