"""How much of a model bitsandbytes can quantize, computed without weights: it supports linear layers only."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from qlora_api.reasons import Reason
from qlora_api.units import GIB
from qlora_api.v1alpha1 import QLoRAJobSpec
from qlora_trainer.errors import RunError

_MIN_QUANTIZED_SHARE: Final = 0.5
"""Fraction of the weights outside the embeddings below which a quantized base needs far more memory than expected."""
_UNQUANTIZED_BYTES_PER_WEIGHT: Final = 2
"""Bytes of a weight that stays in 16 bits."""

_CONVERTIBLE: Final = {
    "mxfp4": "Mxfp4Config",
    "fp8": "FineGrainedFP8Config",
    "compressed-tensors": "CompressedTensorsConfig",
}
"""Configurations of transformers that load stored weights as 16-bit ones, by quant_method.

Some models are published in no other way: gpt-oss in MXFP4, DeepSeek-V3 and Kimi in FP8.
"""


@dataclass(frozen=True)
class QuantizableWeights:
    """Number of weights that a quantized base stores in fewer bits."""

    weights: int
    body: int
    """Weights outside the embedding and the output layer, which are never quantized."""


def count_quantizable(model: Any) -> QuantizableWeights:
    """Count by the rules of transformers' bitsandbytes quantizers; the model may be on the meta device."""
    ends = {id(layer.weight) for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer}
    return QuantizableWeights(
        weights=sum(module.weight.numel() for module in quantizable_modules(model).values()),
        body=sum(weight.numel() for weight in model.parameters() if id(weight) not in ends),
    )


def quantizable_modules(model: Any) -> dict[str, Any]:
    """Return the modules that transformers replaces with those of bitsandbytes, by name."""
    skipped = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    return {
        name: module
        for name, module in model.named_modules()
        if _is_replaced(module) and should_convert_module(name, skipped)
    }


def _is_replaced(module: torch.nn.Module) -> bool:
    # Subclasses are not replaced: Falcon has its own Linear, and stacked experts are not a layer at all.
    return type(module) is torch.nn.Linear or type(module).__name__ == "Conv1D"


def check_quantizable(name: str, found: QuantizableWeights, bits: int) -> None:
    """Raise ModelUnsupported if the base should be quantized and no layer can be."""
    if bits != 16 and not found.weights:
        raise RunError(
            Reason.MODEL_UNSUPPORTED,
            f"spec.quantization.bits: {name} has no layer that bitsandbytes can store in {bits} bits, so "
            "all weights stay in 16 bits; set spec.method to lora and spec.quantization.bits to 16, or choose another "
            "model",
        )


def check_stored_quantization(config: Any, spec: QLoRAJobSpec) -> None:
    """Check that a base whose publisher stored it quantized can be trained as the spec says.

    Args:
        config: The model's configuration; transformers loads by its `quantization_config`, whatever the spec says.
        spec: The run.

    Raises:
        RunError: MODEL_UNSUPPORTED.

    """
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return
    settings = stored if isinstance(stored, Mapping) else stored.to_dict()
    bits = _bitsandbytes_bits(settings)
    original = "use the repository with the original weights, which this one was made from"
    if bits is None:
        convertible = _CONVERTIBLE.get(str(settings.get("quant_method")))
        if convertible:
            original += (
                ", or convert it once with from_pretrained(…, dtype=torch.bfloat16, "
                f"quantization_config={convertible}(dequantize=True)) and save_pretrained of transformers"
            )
        raise RunError(
            Reason.MODEL_UNSUPPORTED,
            f"spec.model.uri: its weights are stored quantized ({settings.get('quant_method', 'unknown method')}), "
            f"and an adapter can be trained on 16-bit weights, or on those that bitsandbytes quantized; {original}",
        )
    if spec.method == "full" or spec.quantization.bits != bits:
        raise RunError(
            Reason.MODEL_UNSUPPORTED,
            f"spec.quantization.bits: the model's weights are already stored in {bits} bits by bitsandbytes; write "
            f"qlora in spec.method and {bits} in bits, or {original}",
        )
    if spec.output.merged != "none":
        raise RunError(
            Reason.MODEL_UNSUPPORTED,
            f"spec.output.merged: an adapter is merged into 16-bit weights, and the model's are stored in {bits} bits; "
            f"remove it, or {original}",
        )


def _bitsandbytes_bits(settings: Mapping[str, Any]) -> int | None:
    """Return the bits of weights that bitsandbytes stored; None for other methods."""
    if settings.get("quant_method") != "bitsandbytes":
        return None
    return 4 if settings.get("load_in_4bit") else 8 if settings.get("load_in_8bit") else None


def describe_quantizable(found: QuantizableWeights, bits: int) -> Iterator[str]:
    """Yield a log line if a quantized base needs far more memory than its bits suggest."""
    share = found.weights / max(found.body, 1)
    if bits != 16 and share < _MIN_QUANTIZED_SHARE:
        remaining = (found.body - found.weights) * _UNQUANTIZED_BYTES_PER_WEIGHT / GIB
        yield (
            f"only {share:.0%} of the weights outside the embeddings are linear layers, the only ones stored in "
            f"{bits} bits; the rest, such as experts stacked in one weight, stays in 16 bits: {remaining:,.1f} GiB"
        )
