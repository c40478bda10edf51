"""Records linear layers, their adapters, and norms, operation by operation."""

from dataclasses import dataclass
from typing import Final

from qlora_planner.memory.autograd_tape import Tensor
from qlora_planner.memory.forward_config import FP32, ForwardConfig
from qlora_planner.memory.torch_ops import Recorder
from qlora_planner.models.shapes import Linear, ModelShape

_BLOCK: Final = 64
"""Weights per scale (weights.BLOCK_4BIT)."""


@dataclass
class LayerRecorder:
    """Records what single layers of a model compute."""

    shape: ModelShape
    config: ForwardConfig
    record: Recorder

    def weight(self, elements: int) -> Tensor:
        """Return a weight of the base, which outlives the pass."""
        return Tensor(elements, self.config.weight_width, requires_grad=self.config.full_finetune, persistent=True)

    def linear(self, x: Tensor, linear: Linear) -> Tensor:
        """Apply a layer of the base with its adapter."""
        rank, quantized = self.config.ranks.get(linear.path, 0), self._is_quantized(linear)
        result = self._quantized_matmul(x, linear) if quantized else self.unquantized_linear(x, linear)
        if rank and quantized and self.config.bits == 4:
            result = self.record.clone(result)  # peft clones the output of bitsandbytes
        if rank:
            result = self._with_adapter(x, result, linear, rank)
        self.record.keep_alive(x)
        return result

    def unquantized_linear(self, x: Tensor, linear: Linear) -> Tensor:
        """Apply an unquantized layer of the base."""
        return self._matmul(x, self.weight(linear.weights), linear.outputs)

    def _is_quantized(self, linear: Linear) -> bool:
        return self.config.bits < 16 and linear.quantizable

    def _matmul(self, x: Tensor, weight: Tensor, outputs: int) -> Tensor:
        """Multiply by a weight [outputs, inputs]; autocast casts both."""
        width, inputs = self.config.compute, weight.elements // outputs
        x, weight = self.record.cast(x, width), self.record.cached_cast(weight, width)
        return self.record.matmul(x, weight, x.elements // inputs * outputs)

    def _quantized_matmul(self, x: Tensor, linear: Linear) -> Tensor:
        """Multiply by a quantized weight, which is dequantized each time; 4-bit layers save nothing."""
        record, width, bits = self.record, self.config.compute, self.config.bits
        cast_input = record.cast(x, width)
        # MatMul8bitFp and MatMul8bitLt hold on to their input, which no gradient needs (bitsandbytes 0.50).
        record.emit(
            cast_input.elements // linear.inputs * linear.outputs,
            width,
            [cast_input],
            [cast_input if bits == 8 else None],
        )
        matrix = linear.weights * width
        # With double quantization the scales are dequantized first: each times its own scale, then shifted.
        scales = 2 * linear.weights // _BLOCK * FP32 if bits == 4 else 0
        # CUDA's forward kernel dequantizes in registers (bitsandbytes 0.50, gemm_4bit), its backward does not.
        forward = matrix + scales if self.config.device == "cpu" else scales
        # MatMul8bitFp and MatMul8bitLt hold on to their input, which no gradient needs (bitsandbytes 0.50).
        held = (cast_input,) if bits == 8 else ()
        return record.cast(
            record.update_last(held_by_node=held, forward_workspace=forward, backward_workspace=matrix + scales),
            x.width,
        )

    def _with_adapter(self, x: Tensor, result: Tensor, linear: Linear, rank: int) -> Tensor:
        """Add peft's B(A(dropout(x))) * scale."""
        record, config, width = self.record, self.config, result.width
        adapter_input = record.cast(x, FP32) if config.upcasts_adapter_input else x
        dropped = self._dropout(adapter_input) if config.dropout else adapter_input
        if config.dora:
            update = self._dora_update(dropped, result, linear, rank)
        else:
            update = record.scale(self._low_rank(dropped, linear, rank))
        if config.bits < 16:
            update = record.cast(update, width)
        result = record.cast(record.add(result, update), width)
        record.keep_alive(adapter_input)
        return result

    def _low_rank(self, x: Tensor, linear: Linear, rank: int) -> Tensor:
        down, up = (
            Tensor(rank * side, FP32, requires_grad=True, persistent=True) for side in (linear.inputs, linear.outputs)
        )
        projected = self._matmul(x, down, rank)
        self.record.keep_alive(x)
        return self._matmul(projected, up, linear.outputs)

    def _dropout(self, x: Tensor) -> Tensor:
        """Apply dropout: on CUDA one kernel that saves a byte per element, on a CPU a product with a random mask."""
        if self.config.device != "cpu":
            return self.record.emit(x.elements, x.width, [x], [self.record.emit(x.elements, 1)])
        return self.record.multiply(x, self.record.emit(x.elements, x.width))

    def _weight_norm(self, linear: Linear) -> Tensor:
        """Compute DoRA's norm of base plus update (peft 0.21, tuners/lora/dora.py); return what variables hold."""
        identity, weights = linear.inputs**2 * self.config.compute, linear.weights * FP32
        # The identity matrix that A and B are applied to, the result in fp32, and the base's weight in fp32.
        held = self.record.emit(identity + 2 * weights, 1)
        # Temporaries of the norm: the scaled update, and its sum with the weight.
        self.record.update_last(forward_workspace=2 * weights)
        return held

    def _base_of_dropout_input(self, x: Tensor, linear: Linear) -> Tensor:
        """Apply the base to the adapter's input after dropout; the dequantized weight is saved for backward."""
        width = self.config.compute
        cast_input, weight = self.record.cast(x, width), self.record.emit(linear.weights, width)
        return self.record.matmul(cast_input, weight, x.elements // linear.inputs * linear.outputs)

    def _dora_update(self, x: Tensor, result: Tensor, linear: Linear, rank: int) -> Tensor:
        """Compute (m - 1) * base + m * B(A(x)) * scale, with m = magnitude / norm."""
        record, dropout = self.record, self.config.dropout
        held = self._weight_norm(linear)
        factor = record.emit(linear.outputs, FP32, [Tensor(linear.outputs, FP32, requires_grad=True, persistent=True)])
        update = self._low_rank(x, linear, rank)
        base = self._base_of_dropout_input(x, linear) if dropout else result
        base = record.scale(base) if linear.bias and not dropout else base  # without its bias
        base_term = record.multiply(record.scale(factor), base)
        result_update = record.add(base_term, record.scale(record.multiply(factor, update)))
        record.keep_alive(held)
        return result_update

    def norm(self, x: Tensor, size: int = 0) -> Tensor:
        """Normalize vectors of a size, by default the hidden size."""
        size = size or self.shape.hidden
        return self._layer_norm(x, size) if self.shape.norm == "layer" else self._rms_norm(x, size)

    def _layer_norm(self, x: Tensor, size: int) -> Tensor:
        """Record one kernel, which saves its input, mean and deviation; CUDA's autocast runs it in fp32."""
        record, config = self.record, self.config
        x = record.cast(x, FP32) if config.device != "cpu" and config.autocast else x
        weight, moments = self.weight(size), record.emit(2 * x.elements // size, FP32)
        return record.emit(x.elements, x.width, [x, weight], [x, moments])

    def _rms_norm(self, x: Tensor, size: int) -> Tensor:
        """Divide by the root mean square in fp32, and multiply by a weight: after the cast back, in Gemma before it."""
        record = self.record
        wide = record.cast(x, FP32)
        inverse = record.unary_saving_output(record.mean(record.power(wide), wide.elements // size))
        normed, weight = record.multiply(wide, inverse), self.weight(size)
        if self.is_gemma:
            return record.cast(record.multiply(normed, record.scale(record.cast(weight, FP32))), x.width)
        return record.multiply(weight, record.cast(normed, x.width))

    @property
    def is_gemma(self) -> bool:
        """Return whether the model is a Gemma, which scales embeddings and has its own RMS norm."""
        return self.shape.family.startswith("gemma")
