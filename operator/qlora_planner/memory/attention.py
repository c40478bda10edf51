"""Records attention operation by operation: what each kernel computes and saves for backward."""

from dataclasses import dataclass
from typing import Final

from qlora_planner.memory.autograd_tape import Tensor
from qlora_planner.memory.forward_config import FP32, ForwardConfig
from qlora_planner.memory.torch_ops import Recorder
from qlora_planner.models.shapes import Attention

UNPACKED_FP32_TOKENS: Final = 256
"""Longest row in tokens up to which a CPU unpacks packed rows in fp32: qlora_trainer.model.unpacked_attention."""
_HEADS_FIRST: Final = frozenset({"phi", "phi3", "gpt_neox", "falcon"})
"""Families that copy queries into head-major memory; those of the others keep the projection's layout."""


_OWN_ATTENTION: Final = frozenset({"falcon"})
"""Families whose class calls SDPA itself (no _supports_attention_backend), so that it cannot be replaced."""


@dataclass(frozen=True)
class AttentionRecorder:
    """Records what happens between the projections of an attention layer."""

    family: str
    attention: Attention
    config: ForwardConfig
    record: Recorder

    @property
    def is_unpacked(self) -> bool:
        """Return whether packed rows are unpacked for SDPA: where that saves token pairs."""
        batch, config = self.config.batch, self.config
        saves = batch.rows * batch.longest**2 < batch.tokens**2
        return batch.packing and config.attention == "sdpa" and self.family not in _OWN_ATTENTION and saves

    def needs_mask(self, *, sliding: bool) -> bool:
        """Return whether a mask is materialized; a plain causal one is left to the kernel."""
        batch, window = self.config.batch, self.attention.window
        if self.config.attention != "sdpa":
            return self.config.attention == "eager"
        windowed = sliding and window is not None and batch.longest > window
        return windowed or (batch.rows > 1 and (batch.packing or not batch.equal_length))

    def masks(self, *, sliding: bool) -> list[Tensor]:
        """Record the masks that layers of a kind share: boolean for SDPA, floating point for eager attention."""
        if not self.needs_mask(sliding=sliding):
            return []
        batch, is_float = self.config.batch, self.config.attention == "eager"
        pairs = batch.tokens**2 if batch.packing else batch.rows * batch.longest**2
        masks = [self.record.emit(pairs, self.config.compute if is_float else 1)]
        return masks + ([self.record.emit(self._pairs, 1)] if self.is_unpacked else [])

    @property
    def _pairs(self) -> int:
        """Return the query-key pairs of a head, masked or not."""
        batch = self.config.batch
        packed = batch.packing and not self.is_unpacked
        return batch.tokens**2 if packed else batch.rows * batch.longest**2

    def apply_rotary(self, x: Tensor) -> Tensor:
        """Record x * cos + rotate_half(x) * sin on the rotated part of each head, and concatenate the rest."""
        record, attention = self.record, self.attention
        table = Tensor(0, x.width, persistent=True)  # counted once, with the embedding
        size = x.elements * attention.rotary // attention.head_dim
        part = x if size == x.elements else record.narrow(x, size)
        first, second = (record.narrow(part, size // 2) for _ in range(2))
        swapped = record.cat(record.scale(second), first)
        rotated = record.add(record.multiply(part, table), record.multiply(swapped, table))
        return rotated if size == x.elements else record.cat(rotated, record.narrow(x, x.elements - size))

    def attention_output(self, query: Tensor, key: Tensor, value: Tensor, *, sliding: bool) -> Tensor:
        """Record the attention of queries, keys and values, and return its output."""
        if self.config.attention == "eager":
            return self._eager(query, key, value)
        if self.is_unpacked:
            return self._unpacked_attention(query, key, value, sliding=sliding)
        output = self._fused(query, key, value, sliding=sliding)
        # The CPU's kernel returns the layout of the queries, and the output projection needs it token-major.
        copied = self.config.device == "cpu" and self.family in _HEADS_FIRST
        return self.record.clone(output) if copied else output

    def _unpacked_attention(self, query: Tensor, key: Tensor, value: Tensor, *, sliding: bool) -> Tensor:
        rows = [self._unpack(each) for each in (query, key, value)]
        output = self._fused(*rows, sliding=sliding)
        return self.record.cast(self.record.emit(query.elements, output.width, [output]), query.width)

    def _unpack(self, x: Tensor) -> Tensor:
        """Unpack tokens into rows padded to the longest one, in fp32 if that is short."""
        batch = self.config.batch
        elements = x.elements // batch.tokens * batch.rows * batch.longest
        unpacked = self.record.emit(elements, x.width, [x])
        in_fp32 = self.config.device == "cpu" and batch.longest <= UNPACKED_FP32_TOKENS
        return self.record.cast(unpacked, FP32 if in_fp32 else x.width)

    def _fused(self, query: Tensor, key: Tensor, value: Tensor, *, sliding: bool) -> Tensor:
        """Record one fused kernel, which saves its inputs, its output and the logsumexp of each softmax."""
        record, mask = self.record, None
        sums = record.emit(query.elements // self.attention.head_dim, FP32)
        if self.needs_mask(sliding=sliding):
            # No kernel supports grouped heads together with a mask.
            key, value = self._repeat(key, query.elements), self._repeat(value, query.elements)
            mask = record.emit(self._pairs, query.width)  # every layer converts the boolean mask to floating point
        record.emit(query.elements, query.width, [query, key, value], [query, key, value, sums, mask])
        return record.save_output()

    def _repeat(self, x: Tensor, elements: int) -> Tensor:
        """Record repeat_kv: copy keys or values for each query head; those of a single head are expanded as a view."""
        if x.elements == elements:
            return x
        if self.attention.kv_heads == 1:
            return self.record.view(x, elements, requires_grad=x.requires_grad)
        return self.record.emit(elements, x.width, [x])

    def _eager(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Record eager attention, which materializes every matrix of scores."""
        record, width = self.record, self.config.compute
        key, value = self._repeat(key, query.elements), self._repeat(value, query.elements)
        query, key, value = (record.cast(each, width) for each in (query, key, value))
        scores = record.scale(record.matmul(query, key, self._pairs * self.attention.heads))
        if self.attention.softcapped:
            scores = record.scale(record.unary_saving_output(record.scale(scores)))
        masked = record.add(scores, Tensor(0, width, persistent=True))
        probabilities = record.cast(record.softmax(masked), width)
        return record.clone(record.matmul(probabilities, value, query.elements))  # token-major
