"""The layers of a decoder, operation by operation, as transformers 5.23 computes them."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Final

from qlora_planner.memory.attention import Attending
from qlora_planner.memory.autograd_tape import Segment, Tensor
from qlora_planner.memory.forward_config import FP32, Setting
from qlora_planner.memory.linear_layers import Layers
from qlora_planner.memory.torch_ops import Recorder
from qlora_planner.models.shapes import Linear, ModelShape

_RANDOM_STATE: Final = 5056
"""Bytes of torch.get_rng_state(); of a GPU's generator it is 16."""


@dataclass
class Decoder:
    """A model in a setting, of which layers are written down one after the other."""

    shape: ModelShape
    setting: Setting
    record: Recorder = field(default_factory=Recorder)

    @cached_property
    def layers(self) -> Layers:
        """Return what writes down single layers."""
        return Layers(self.shape, self.setting, self.record)

    @cached_property
    def attending(self) -> Attending:
        """Return what writes down attention."""
        return Attending(self.shape.family, self.shape.attention, self.setting, self.record)

    def embed(self) -> Segment:
        """Write down the embedding, and what all layers share."""
        shape, setting, record = self.shape, self.setting, self.record
        tokens, table = setting.lines.tokens, self.layers.weight(shape.embedding.parameters)
        states = record.made(tokens * shape.hidden, table.width, [table])
        states = record.scale(states) if self.layers.is_gemma else states
        if setting.noise:  # drawn in fp32, then added
            states = record.add(states, record.cast(record.made(states.elements, FP32), states.width))
        if setting.checkpointing:  # enable_input_require_grads
            states = record.view(states, states.elements, learns=True)
        angles = [record.made(tokens * shape.attention.rotary, states.width) for _ in ("cos", "sin")]
        # The embeddings as well: the model's forward function has a variable for them.
        slide = shape.attention.sliding_layers
        kinds = ([False] if slide < shape.layers else []) + ([True] if slide else [])
        masks = [mask for sliding in kinds for mask in self.attending.masks(sliding=sliding)]
        segment = record.cut(states, states, *angles, *masks)
        # Masks that are laid apart stay with their layout until the next one (qlora_trainer.model.unpacked_attention).
        return replace(segment, lasting=tuple(masks)) if self.attending.laid_apart else segment

    def layer(self, states: Tensor, *, sliding: bool) -> Segment:
        """Write down one layer, and the state of the random numbers that its recomputation starts from."""
        setting, record = self.setting, self.record
        kept = [record.made(_RANDOM_STATE, 1)] if setting.checkpointing and setting.device == "cpu" else []
        output = self._parallel(states, sliding) if self.shape.parallel else self._sequential(states, sliding)
        return record.cut(output, *kept)

    def _parallel(self, states: Tensor, sliding: bool) -> Tensor:
        norm = self.layers.norm
        inside = norm(states)
        attended = self._attention(inside, sliding)
        fed = self._mlp(norm(states) if self._norms == 2 else inside)
        return self.record.add(self.record.add(attended, fed), states)

    def _sequential(self, states: Tensor, sliding: bool) -> Tensor:
        norm, after = self.layers.norm, self._norms == 4
        attended = self._attention(norm(states), sliding)
        between = self.record.add(states, norm(attended) if after else attended)
        fed = self._mlp(norm(between))
        return self.record.add(between, norm(fed) if after else fed)

    def choose(self, states: Tensor) -> Segment:
        """Write down the last states of the positions that are learned, or their logits if those are no plain product.

        Gemma 2 caps its logits, so that those of every position are computed at once.
        """
        shape, record, labels = self.shape, self.record, self.setting.lines.labels
        states = self.layers.norm(states)
        if shape.plain_head:
            return record.cut(record.made(labels * shape.hidden, states.width, [states]))
        logits = self.layers.plain(states, shape.head)
        capped = record.scale(record.from_output(record.scale(logits)))
        record.until_here(states)
        return record.cut(record.made(labels * shape.vocabulary, capped.width, [capped]))

    @property
    def _norms(self) -> int:
        """Return a layer's norms of hidden states: 1 before both parts, 2 before each, 4 after each as well."""
        names = [module.path for module in self.shape.decoder.others if "." not in module.path]
        return sum("norm" in name or name.startswith("ln_") for name in names)

    def _attention(self, x: Tensor, sliding: bool) -> Tensor:
        attention, attending, norm = self.shape.attention, self.attending, self.layers.norm
        query, key, value = self._projections(x)
        if attention.normed:
            query, key = norm(query, attention.head_dim), norm(key, attention.head_dim)
        if attention.rotary:
            query, key = attending.rotate(query), attending.rotate(key)
        attended = attending.attend(query, key, value, sliding=sliding)
        output = self._linear(attended, "o_proj", "dense")
        self.record.until_here(x, query, key, value)
        return output

    def _projections(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self._has("q_proj"):
            return self._linear(x, "q_proj"), self._linear(x, "k_proj"), self._linear(x, "v_proj")
        joint, attention = self._linear(x, "qkv_proj", "query_key_value"), self.shape.attention
        size, copies = self.setting.lines.tokens * attention.head_dim, self.shape.family == "falcon"
        # Falcon picks keys and values out of it by index, which copies, and with groups once for each query head.
        kv_heads = attention.heads if copies and attention.kv_heads > 1 else attention.kv_heads
        query = self.record.part(joint, size * attention.heads)
        if copies:
            key, value = (self.record.made(size * kv_heads, joint.width, [joint]) for _ in "kv")
        else:
            key, value = (self.record.part(joint, size * kv_heads) for _ in "kv")
        return query, key, value

    def _mlp(self, x: Tensor) -> Tensor:
        output = self._feed_gated(x) if self.shape.mlp.gated else self._feed(x)
        self.record.until_here(x)
        return output

    def _feed(self, x: Tensor) -> Tensor:
        inside = self._activation(self._linear(x, "fc1", "dense_h_to_4h"))
        return self._linear(inside, "fc2", "dense_4h_to_h")

    def _feed_gated(self, x: Tensor) -> Tensor:
        record = self.record
        if self._has("gate_up_proj"):
            joint = self._linear(x, "gate_up_proj")
            gate, up = (record.part(joint, joint.elements // 2) for _ in range(2))
            return self._linear(record.multiply(up, self._activation(gate)), "down_proj")
        gate = self._activation(self._linear(x, "gate_proj"))
        return self._linear(record.multiply(gate, self._linear(x, "up_proj")), "down_proj")

    def _activation(self, x: Tensor) -> Tensor:
        record = self.record
        if self.shape.mlp.activation != "gelu_new":
            return record.from_input(x)
        # 0.5 * x * (1 + tanh(c * (x + 0.044715 * x ** 3))), written out in Python,
        # in which CUDA's autocast has powers in fp32, and so what follows.
        powered = record.cast(x, FP32) if self.setting.device != "cpu" and self.setting.autocast else x
        inner = record.scale(record.add(x, record.scale(record.power(powered))))
        return record.multiply(record.scale(x), record.scale(record.from_output(inner)))

    def _linear(self, x: Tensor, *names: str) -> Tensor:
        return self.layers.linear(x, next(linear for linear in self.shape.decoder.linears if _is(linear, *names)))

    def _has(self, name: str) -> bool:
        return any(_is(linear, name) for linear in self.shape.decoder.linears)


def _is(linear: Linear, *names: str) -> bool:
    return linear.path.rpartition(".")[2] in names
