"""Attention, operation by operation: what queries, keys and values become, and what a kernel keeps of them."""

from dataclasses import dataclass
from typing import Final

from qlora_planner.memory.autograd_tape import Tensor
from qlora_planner.memory.forward_config import FP32, ForwardConfig
from qlora_planner.memory.torch_ops import Recorder
from qlora_planner.models.shapes import Attention

UNPACKED_FP32_TOKENS: Final = 256
"""Tokens up to which joined rows are laid apart in fp32: qlora_trainer.model.unpacked_attention."""
_HEADS_FIRST: Final = frozenset({"phi", "phi3", "gpt_neox", "falcon"})
"""Families that copy queries into memory of their own, head by head: the others' lie as the projection left them."""


@dataclass(frozen=True)
class AttentionRecorder:
    """Writes down what happens between the projections of an attention layer."""

    family: str
    attention: Attention
    config: ForwardConfig
    record: Recorder

    @property
    def is_unpacked(self) -> bool:
        """Return whether packed rows are unpacked for attention: on a CPU, where that saves token pairs."""
        lines, setting = self.config.batch, self.config
        saves = lines.rows * lines.longest**2 < lines.tokens**2
        return lines.packing and setting.device == "cpu" and setting.attention == "sdpa" and saves

    def needs_mask(self, *, sliding: bool) -> bool:
        """Return whether a mask is written out; a causal one alone is left to the kernel."""
        lines, window = self.config.batch, self.attention.window
        if self.config.attention != "sdpa":
            return self.config.attention == "eager"
        narrow = sliding and window is not None and lines.longest > window
        return narrow or (lines.rows > 1 and (lines.packing or not lines.equal_length))

    def masks(self, *, sliding: bool) -> list[Tensor]:
        """Write down the masks that layers of a kind share: booleans for SDPA, numbers for eager attention."""
        if not self.needs_mask(sliding=sliding):
            return []
        lines, numbers = self.config.batch, self.config.attention == "eager"
        pairs = lines.tokens**2 if lines.packing else lines.rows * lines.longest**2
        masks = [self.record.emit(pairs, self.config.compute if numbers else 1)]
        return masks + ([self.record.emit(self._pairs, 1)] if self.is_unpacked else [])

    @property
    def _pairs(self) -> int:
        """Return the pairs of positions that a head looks at, masked or not."""
        lines = self.config.batch
        joined = lines.packing and not self.is_unpacked
        return lines.tokens**2 if joined else lines.rows * lines.longest**2

    def apply_rotary(self, x: Tensor) -> Tensor:
        """X * cos + rotate_half(x) * sin on the rotated part of each head, to which the rest is joined again."""
        record, attention = self.record, self.attention
        table = Tensor(0, x.width, persistent=True)  # counted once, with the embedding
        size = x.elements * attention.rotary // attention.head_dim
        given = x if size == x.elements else record.narrow(x, size)
        first, second = (record.narrow(given, size // 2) for _ in range(2))
        swapped = record.cat(record.scale(second), first)
        turned = record.add(record.multiply(given, table), record.multiply(swapped, table))
        return turned if size == x.elements else record.cat(turned, record.narrow(x, x.elements - size))

    def attention_output(self, query: Tensor, key: Tensor, value: Tensor, *, sliding: bool) -> Tensor:
        """Let tokens look at each other."""
        if self.config.attention == "eager":
            return self._eager(query, key, value)
        if self.is_unpacked:
            return self._unpacked_attention(query, key, value, sliding=sliding)
        output = self._fused(query, key, value, sliding=sliding)
        # The CPU's kernel lays its output out as the queries are, and what follows wants it token by token.
        copied = self.config.device == "cpu" and self.family in _HEADS_FIRST
        return self.record.clone(output) if copied else output

    def _unpacked_attention(self, query: Tensor, key: Tensor, value: Tensor, *, sliding: bool) -> Tensor:
        lines = [self._unpack(each) for each in (query, key, value)]
        output = self._fused(*lines, sliding=sliding)
        return self.record.cast(self.record.emit(query.elements, output.width, [output]), query.width)

    def _unpack(self, x: Tensor) -> Tensor:
        """Pick tokens into lines as long as the longest row, in fp32 if that is short."""
        lines = self.config.batch
        elements = x.elements // lines.tokens * lines.rows * lines.longest
        apart = self.record.emit(elements, x.width, [x])
        return self.record.cast(apart, FP32 if lines.longest <= UNPACKED_FP32_TOKENS else x.width)

    def _fused(self, query: Tensor, key: Tensor, value: Tensor, *, sliding: bool) -> Tensor:
        """One kernel, which keeps its inputs, its output and the logarithm of each softmax's sum."""
        record, mask = self.record, None
        sums = record.emit(query.elements // self.attention.head_dim, FP32)
        if self.needs_mask(sliding=sliding):
            # No kernel shares heads and has a mask.
            key, value = self._repeat(key, query.elements), self._repeat(value, query.elements)
            mask = record.emit(self._pairs, query.width)  # every layer makes numbers of the booleans anew
        record.emit(query.elements, query.width, [query, key, value], [query, key, value, sums, mask])
        return record.save_output()

    def _repeat(self, x: Tensor, elements: int) -> Tensor:
        """Copy keys or values for each query head; of a single head, every copy can be the same memory."""
        if x.elements == elements:
            return x
        if self.attention.kv_heads == 1:
            return self.record.view(x, elements, learns=x.requires_grad)
        return self.record.emit(elements, x.width, [x])

    def _eager(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Step by step, every matrix of scores written out."""
        record, width = self.record, self.config.compute
        key, value = self._repeat(key, query.elements), self._repeat(value, query.elements)
        query, key, value = (record.cast(each, width) for each in (query, key, value))
        scores = record.scale(record.matmul(query, key, self._pairs * self.attention.heads))
        if self.attention.softcapped:
            scores = record.scale(record.unary_saving_output(record.scale(scores)))
        masked = record.add(scores, Tensor(0, width, persistent=True))
        shares = record.cast(record.softmax(masked), width)
        return record.clone(record.matmul(shares, value, query.elements))  # token by token
