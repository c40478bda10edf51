"""Records the layers of a decoder operation by operation, as transformers 5.23 computes them."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Final

from qlora_planner.memory.attention import AttentionRecorder
from qlora_planner.memory.autograd_tape import Segment, Tensor
from qlora_planner.memory.forward_config import FP32, ForwardConfig
from qlora_planner.memory.linear_layers import LayerRecorder
from qlora_planner.memory.torch_ops import Recorder
from qlora_planner.models.shapes import Linear, ModelShape

_RANDOM_STATE: Final = 5056
"""Bytes of torch.get_rng_state() on a CPU; a GPU's has 16."""
_GELU_WITH_POWER: Final = frozenset({"gelu_accurate", "gelu_new", "gelu_python_tanh"})
_GELU_WITH_PRODUCT: Final = "gelu_fast"
_GELU_WITH_SIGMOID: Final = "quick_gelu"
"""Activations that transformers 5.23 computes in Python, each operation saving what its backward needs."""


@dataclass
class Decoder:
    """Records the layers of a model one after the other."""

    shape: ModelShape
    config: ForwardConfig
    record: Recorder = field(default_factory=Recorder)

    @cached_property
    def layers(self) -> LayerRecorder:
        """Return the recorder of linear layers and norms."""
        return LayerRecorder(self.shape, self.config, self.record)

    @cached_property
    def attention_recorder(self) -> AttentionRecorder:
        """Return the recorder of attention."""
        return AttentionRecorder(self.shape.family, self.shape.attention, self.config, self.record)

    def embed(self) -> Segment:
        """Record the embedding, and the masks and rotary tables that all layers share."""
        shape, config, record = self.shape, self.config, self.record
        tokens, table = config.batch.tokens, self.layers.weight(shape.embedding.parameters)
        states = record.emit(tokens * shape.hidden, table.width, [table])
        states = record.scale(states) if self.layers.is_gemma else states
        if config.neftune:  # drawn in fp32, then added
            states = record.add(states, record.cast(record.emit(states.elements, FP32), states.width))
        if config.checkpointing:  # enable_input_require_grads
            states = record.view(states, states.elements, requires_grad=True)
        angles = [record.emit(tokens * shape.attention.rotary, states.width) for _ in ("cos", "sin")]
        # `states` is shared too: a local variable of the model's forward function holds it.
        sliding_layers = shape.attention.sliding_layers
        kinds = ([False] if sliding_layers < shape.layers else []) + ([True] if sliding_layers else [])
        masks = [mask for sliding in kinds for mask in self.attention_recorder.masks(sliding=sliding)]
        segment = record.end_segment(states, states, *angles, *masks)
        # Unpacked masks are cached with their layout until the next batch (qlora_trainer.model.unpacked_attention).
        return replace(segment, held_through_forward=tuple(masks)) if self.attention_recorder.is_unpacked else segment

    def layer(self, states: Tensor, *, sliding: bool) -> Segment:
        """Record one layer, and the random state that its recomputation restores."""
        config, record = self.config, self.record
        random_state = [record.emit(_RANDOM_STATE, 1)] if config.checkpointing and config.device == "cpu" else []
        output = self._parallel(states, sliding) if self.shape.parallel else self._sequential(states, sliding)
        return record.end_segment(output, *random_state)

    def _parallel(self, states: Tensor, sliding: bool) -> Tensor:
        norm = self.layers.norm
        normed = norm(states)
        attended = self._attention(normed, sliding)
        mlp = self._mlp(norm(states) if self._norms == 2 else normed)
        return self.record.add(self.record.add(attended, mlp), states)

    def _sequential(self, states: Tensor, sliding: bool) -> Tensor:
        norm, norm_outputs = self.layers.norm, self._norms == 4
        attended = self._attention(norm(states), sliding)
        middle = self.record.add(states, norm(attended) if norm_outputs else attended)
        mlp = self._mlp(norm(middle))
        return self.record.add(middle, norm(mlp) if norm_outputs else mlp)

    def select_labeled(self, states: Tensor) -> Segment:
        """Record the last hidden states of the labeled positions, or their logits if the head is not a plain product.

        Gemma 2 caps its logits, so those of all positions are computed at once.
        """
        shape, record, labels = self.shape, self.record, self.config.batch.labels
        states = self.layers.norm(states)
        if shape.plain_head:
            return record.end_segment(record.emit(labels * shape.hidden, states.width, [states]))
        logits = self.layers.unquantized_linear(states, shape.head)
        capped = record.scale(record.unary_saving_output(record.scale(logits)))
        record.keep_alive(states)
        return record.end_segment(record.emit(labels * shape.vocabulary, capped.width, [capped]))

    @property
    def _norms(self) -> int:
        """Return the norms per layer: 1 shared by attention and MLP, 2 one before each, 4 also one after each."""
        names = [module.path for module in self.shape.decoder.others if "." not in module.path]
        return sum("norm" in name or name.startswith("ln_") for name in names)

    def _attention(self, x: Tensor, sliding: bool) -> Tensor:
        attention, recorder, norm = self.shape.attention, self.attention_recorder, self.layers.norm
        query, key, value = self._projections(x)
        if attention.qk_norm:
            query, key = norm(query, attention.head_dim), norm(key, attention.head_dim)
        if attention.rotary:
            query, key = recorder.apply_rotary(query), recorder.apply_rotary(key)
        attended = recorder.attention_output(query, key, value, sliding=sliding)
        output = self._linear(attended, "o_proj", "dense")
        self.record.keep_alive(x, query, key, value)
        return output

    def _projections(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self._has("q_proj"):
            return self._linear(x, "q_proj"), self._linear(x, "k_proj"), self._linear(x, "v_proj")
        fused, attention = self._linear(x, "qkv_proj", "query_key_value"), self.shape.attention
        size, is_falcon = self.config.batch.tokens * attention.head_dim, self.shape.family == "falcon"
        # Falcon selects keys and values by index, which copies; with grouped heads, once per query head.
        kv_heads = attention.heads if is_falcon and attention.kv_heads > 1 else attention.kv_heads
        query = self.record.narrow(fused, size * attention.heads)
        if is_falcon:
            key, value = (self.record.emit(size * kv_heads, fused.width, [fused]) for _ in "kv")
        else:
            key, value = (self.record.narrow(fused, size * kv_heads) for _ in "kv")
        return query, key, value

    def _mlp(self, x: Tensor) -> Tensor:
        output = self._gated_mlp(x) if self.shape.mlp.gated else self._plain_mlp(x)
        self.record.keep_alive(x)
        return output

    def _plain_mlp(self, x: Tensor) -> Tensor:
        activated = self._activation(self._linear(x, "fc1", "dense_h_to_4h"))
        return self._linear(activated, "fc2", "dense_4h_to_h")

    def _gated_mlp(self, x: Tensor) -> Tensor:
        record = self.record
        if self._has("gate_up_proj"):
            fused = self._linear(x, "gate_up_proj")
            gate, up = (record.narrow(fused, fused.elements // 2) for _ in range(2))
            return self._linear(record.multiply(up, self._activation(gate)), "down_proj")
        gate = self._activation(self._linear(x, "gate_proj"))
        return self._linear(record.multiply(gate, self._linear(x, "up_proj")), "down_proj")

    def _activation(self, x: Tensor) -> Tensor:
        """Record one kernel, or the operations of a function that transformers computes in Python (activations.py)."""
        name = self.shape.mlp.activation
        if name in _GELU_WITH_POWER:
            return self._gelu_with_power(x)
        if name == _GELU_WITH_PRODUCT:
            return self._gelu_with_product(x)
        if name == _GELU_WITH_SIGMOID:
            return self.record.multiply(x, self.record.unary_saving_output(self.record.scale(x)))
        return self.record.unary_saving_input(x)

    def _gelu_with_power(self, x: Tensor) -> Tensor:
        """Record 0.5 * x * (1 + tanh(c * (x + 0.044715 * x ** 3))).

        CUDA's autocast computes powers in fp32, and so what follows.
        """
        record = self.record
        powered = record.cast(x, FP32) if self.config.device != "cpu" and self.config.autocast else x
        inner = record.scale(record.add(x, record.scale(record.power(powered))))
        return record.multiply(record.scale(x), record.scale(record.unary_saving_output(inner)))

    def _gelu_with_product(self, x: Tensor) -> Tensor:
        """Record 0.5 * x * (1 + tanh(c * x * (1 + 0.044715 * x * x)))."""
        record = self.record
        square = record.scale(record.multiply(record.scale(x), x))
        inner = record.multiply(record.scale(x), square)
        return record.multiply(record.scale(x), record.scale(record.unary_saving_output(inner)))

    def _linear(self, x: Tensor, *names: str) -> Tensor:
        return self.layers.linear(x, next(linear for linear in self.shape.decoder.linears if _is(linear, *names)))

    def _has(self, name: str) -> bool:
        return any(_is(linear, name) for linear in self.shape.decoder.linears)


def _is(linear: Linear, *names: str) -> bool:
    return linear.path.rpartition(".")[2] in names
