"""How much of a model bitsandbytes makes smaller, told before its weights are there: it knows linear layers only."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from qlora_api.reasons import Reason
from qlora_api.units import GIB
from qlora_trainer.errors import RunError

_MIN_QUANTIZED_SHARE: Final = 0.5
"""Share of the weights outside embeddings below which the memory is not what a quantised base lets one expect."""
_UNQUANTIZED_BYTES_PER_WEIGHT: Final = 2
"""Of a weight that stays in 16 bits."""


@dataclass(frozen=True)
class QuantizableWeights:
    """What of a model's weights a quantised base makes smaller."""

    weights: int
    body: int
    """Weights outside the embedding and the output layer, which stay as they are in any model."""


def count_quantizable(model: Any) -> QuantizableWeights:
    """Count by the rules of transformers' bitsandbytes quantizers, on a model whose weights need not exist."""
    kept = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    ends = {id(layer.weight) for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer}
    return QuantizableWeights(
        weights=sum(
            module.weight.numel()
            for name, module in model.named_modules()
            if _is_replaced(module) and should_convert_module(name, kept)
        ),
        body=sum(weight.numel() for weight in model.parameters() if id(weight) not in ends),
    )


def _is_replaced(module: torch.nn.Module) -> bool:
    # A subclass is not: Falcon has its own Linear, and experts that are stacked in one weight are no layer at all.
    return type(module) is torch.nn.Linear or type(module).__name__ == "Conv1D"


def check_quantizable(name: str, found: QuantizableWeights, bits: int) -> None:
    """Refuse a quantised base of which nothing is quantised."""
    if bits != 16 and not found.weights:
        raise RunError(
            Reason.MODEL_UNSUPPORTED,
            f"spec.quantization.bits: {name} has no layer that bitsandbytes can store in {bits} bits, and stays in "
            "16 as a whole; set spec.method to lora and spec.quantization.bits to 16, or choose another model",
        )


def describe_quantizable(found: QuantizableWeights, bits: int) -> Iterator[str]:
    """Yield a sentence where a quantised base takes far more memory than its name says."""
    share = found.weights / max(found.body, 1)
    if bits != 16 and share < _MIN_QUANTIZED_SHARE:
        left = (found.body - found.weights) * _UNQUANTIZED_BYTES_PER_WEIGHT / GIB
        yield (
            f"only {share:.0%} of the weights outside the embeddings are linear layers, which alone are stored in "
            f"{bits} bits: the rest, such as experts stacked in one weight, stays in 16 and takes {left:,.1f} GiB"
        )
