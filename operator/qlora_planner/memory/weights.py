"""Memory of weights and optimizer state on a GPU; every constant has its unit and source."""

from dataclasses import dataclass
from math import ceil
from typing import Final

from qlora_api.optimizers import OPTIMIZERS, OptimizerName
from qlora_api.v1alpha1 import QuantizationSpec
from qlora_planner.memory.adapter import Trainable
from qlora_planner.models.shapes import Linear, ModelWeights

FP32: Final = 4
"""Bytes per element."""
HALF: Final = 2
"""Bytes per element of bf16 and fp16."""

BLOCK_4BIT: Final = 64
"""Weights per scale (bitsandbytes 0.50, functional.quantize_4bit; QLoRA paper, section 3)."""
BLOCK_OF_SCALES: Final = 256
"""Scales per fp32 scale under double quantization (same sources)."""
CODEBOOKS_DOUBLE: Final = 16 * FP32 + 256 * FP32 + FP32
"""Bytes of a matrix's codebook, its scales' codebook and their mean (same sources: QuantState)."""
CODEBOOK: Final = 16 * FP32
"""Bytes of a matrix's codebook without double quantization."""


@dataclass(frozen=True)
class BaseBytes:
    """Bytes of the base model."""

    weights: int
    """Bytes of the weights, as in transformers' get_memory_footprint."""
    constants: int
    """Bytes of scales and codebooks of the quantization, which get_memory_footprint leaves out."""

    @property
    def total(self) -> int:
        """Return the bytes on the device."""
        return self.weights + self.constants


def base_bytes(shape: ModelWeights, quantization: QuantizationSpec, width: int) -> BaseBytes:
    """Return the bytes of a base whose unquantized weights take `width` bytes each."""
    bits, wider = quantization.bits, shape.kept_in_fp32 * (FP32 - width)
    if bits == 16:
        return BaseBytes(shape.parameters * width + wider, 0)
    matrices = [(block.count, linear) for block in shape.blocks for linear in block.linears if linear.quantizable]
    stored = sum(count * ceil(linear.weights * bits / 8) for count, linear in matrices)
    constants = sum(count * constant_bytes(linear, quantization) for count, linear in matrices)
    return BaseBytes(stored + (shape.parameters - shape.quantizable) * width + wider, constants)


def constant_bytes(linear: Linear, quantization: QuantizationSpec) -> int:
    """Return the bytes of scales and codebooks of one quantized matrix."""
    if quantization.bits == 8:
        return linear.outputs * FP32
    scales = ceil(linear.weights / BLOCK_4BIT)
    if not quantization.double_quant:
        return scales * FP32 + CODEBOOK
    return scales + ceil(scales / BLOCK_OF_SCALES) * FP32 + CODEBOOKS_DOUBLE


def optimizer_bytes(trainable: Trainable, optimizer: OptimizerName) -> int:
    """Return the bytes of optimizer state that stay on the GPU."""
    return sum(OPTIMIZERS[optimizer].state_bytes(size) for size in trainable.tensors)
