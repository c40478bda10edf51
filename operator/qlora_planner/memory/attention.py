"""Attention, operation by operation: what queries, keys and values become, and what a kernel keeps of them."""

from dataclasses import dataclass
from typing import Final

from qlora_planner.memory.autograd_tape import Tensor
from qlora_planner.memory.forward_config import FP32, Setting
from qlora_planner.memory.torch_ops import Recorder
from qlora_planner.models.shapes import Attention

SHORT: Final = 256
"""Tokens up to which joined rows are laid apart in fp32: qlora_trainer.model.unpacked_attention."""
_HEADS_FIRST: Final = frozenset({"phi", "phi3", "gpt_neox", "falcon"})
"""Families that copy queries into memory of their own, head by head: the others' lie as the projection left them."""


@dataclass(frozen=True)
class Attending:
    """Writes down what happens between the projections of an attention layer."""

    family: str
    attention: Attention
    setting: Setting
    record: Recorder

    @property
    def laid_apart(self) -> bool:
        """Return whether joined rows lie beside each other: on a CPU, where that saves pairs (qlora_trainer.model.unpacked_attention)."""
        lines, setting = self.setting.lines, self.setting
        saves = lines.rows * lines.longest**2 < lines.tokens**2
        return lines.packing and setting.device == "cpu" and setting.attention == "sdpa" and saves

    def masked(self, *, sliding: bool) -> bool:
        """Return whether a mask is written out; a causal one alone is left to the kernel."""
        lines, window = self.setting.lines, self.attention.window
        if self.setting.attention != "sdpa":
            return self.setting.attention == "eager"
        narrow = sliding and window is not None and lines.longest > window
        return narrow or (lines.rows > 1 and (lines.packing or not lines.even))

    def masks(self, *, sliding: bool) -> list[Tensor]:
        """Write down the masks that layers of a kind share: booleans for SDPA, numbers for eager attention."""
        if not self.masked(sliding=sliding):
            return []
        lines, numbers = self.setting.lines, self.setting.attention == "eager"
        pairs = lines.tokens**2 if lines.packing else lines.rows * lines.longest**2
        masks = [self.record.made(pairs, self.setting.compute if numbers else 1)]
        return masks + ([self.record.made(self._pairs, 1)] if self.laid_apart else [])

    @property
    def _pairs(self) -> int:
        """Return the pairs of positions that a head looks at, masked or not."""
        lines = self.setting.lines
        joined = lines.packing and not self.laid_apart
        return lines.tokens**2 if joined else lines.rows * lines.longest**2

    def rotate(self, x: Tensor) -> Tensor:
        """X * cos + rotate_half(x) * sin on the rotated part of each head, to which the rest is joined again."""
        record, attention = self.record, self.attention
        table = Tensor(0, x.width, lasting=True)  # counted once, with the embedding
        size = x.elements * attention.rotary // attention.head_dim
        given = x if size == x.elements else record.part(x, size)
        first, second = (record.part(given, size // 2) for _ in range(2))
        swapped = record.join(record.scale(second), first)
        turned = record.add(record.multiply(given, table), record.multiply(swapped, table))
        return turned if size == x.elements else record.join(turned, record.part(x, x.elements - size))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, sliding: bool) -> Tensor:
        """Let tokens look at each other."""
        if self.setting.attention == "eager":
            return self._eager(query, key, value)
        if self.laid_apart:
            return self._apart(query, key, value, sliding=sliding)
        output = self._fused(query, key, value, sliding=sliding)
        # The CPU's kernel lays its output out as the queries are, and what follows wants it token by token.
        copied = self.setting.device == "cpu" and self.family in _HEADS_FIRST
        return self.record.copy(output) if copied else output

    def _apart(self, query: Tensor, key: Tensor, value: Tensor, *, sliding: bool) -> Tensor:
        lines = [self._lay_apart(each) for each in (query, key, value)]
        output = self._fused(*lines, sliding=sliding)
        return self.record.cast(self.record.made(query.elements, output.width, [output]), query.width)

    def _lay_apart(self, x: Tensor) -> Tensor:
        """Pick tokens into lines as long as the longest row, in fp32 if that is short."""
        lines = self.setting.lines
        elements = x.elements // lines.tokens * lines.rows * lines.longest
        apart = self.record.made(elements, x.width, [x])
        return self.record.cast(apart, FP32 if lines.longest <= SHORT else x.width)

    def _fused(self, query: Tensor, key: Tensor, value: Tensor, *, sliding: bool) -> Tensor:
        """One kernel, which keeps its inputs, its output and the logarithm of each softmax's sum."""
        record, mask = self.record, None
        sums = record.made(query.elements // self.attention.head_dim, FP32)
        if self.masked(sliding=sliding):
            # No kernel shares heads and has a mask.
            key, value = self._repeat(key, query.elements), self._repeat(value, query.elements)
            mask = record.made(self._pairs, query.width)  # every layer makes numbers of the booleans anew
        record.made(query.elements, query.width, [query, key, value], [query, key, value, sums, mask])
        return record.saving_output()

    def _repeat(self, x: Tensor, elements: int) -> Tensor:
        """Copy keys or values for each query head; of a single head, every copy can be the same memory."""
        if x.elements == elements:
            return x
        if self.attention.kv_heads == 1:
            return self.record.view(x, elements, learns=x.learns)
        return self.record.made(elements, x.width, [x])

    def _eager(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Step by step, every matrix of scores written out."""
        record, width = self.record, self.setting.compute
        key, value = self._repeat(key, query.elements), self._repeat(value, query.elements)
        query, key, value = (record.cast(each, width) for each in (query, key, value))
        scores = record.scale(record.product(query, key, self._pairs * self.attention.heads))
        if self.attention.capped:
            scores = record.scale(record.from_output(record.scale(scores)))
        masked = record.add(scores, Tensor(0, width, lasting=True))
        shares = record.cast(record.softmax(masked), width)
        return record.copy(record.product(shares, value, query.elements))  # token by token
