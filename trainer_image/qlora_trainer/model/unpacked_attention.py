"""Attention of joined rows on a CPU: row beside row, instead of one long sequence of which most is masked.

SDPA computes every pair of positions of what it gets, whatever the mask says. Sixteen joined rows of 40 tokens are
410,000 pairs; beside each other they are 26,000.
"""

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

UNPACKED_SDPA: Final = "sdpa_apart"
"""The name under which transformers knows it."""
_FP32_MAX_ROW_TOKENS: Final = 256
"""Rows up to this are computed in fp32: torch 2.15's bf16 kernel takes 17 ms backward where the fp32 one takes 7
(16 rows of 60 tokens, 9 heads of 64, AVX512-BF16); from 512 tokens on it is the faster one."""


def use_unpacked_sdpa(model: Any) -> None:
    """Use it in place of SDPA in a model on a CPU, if its class takes its attention by name."""
    if model.device.type == "cpu" and model.config._attn_implementation == "sdpa" and model._supports_attention_backend:
        model.set_attn_implementation(UNPACKED_SDPA)


@dataclass(frozen=True, eq=False)
class PackedLayout:
    """Where the tokens of joined rows go when each row gets a line of its own."""

    slot_of_token: torch.Tensor
    """Place of each token in the flattened lines [tokens]."""
    token_of_slot: torch.Tensor
    """Token at each place of the lines [rows, width]; a row's last token again where the row has ended."""
    filled: torch.Tensor
    """Whether the row has not ended there [rows, width]."""
    masks: dict[torch.Tensor, torch.Tensor] = field(default_factory=dict)
    """Masks laid apart, by what they were made of: full and sliding layers have one each. They go with the layout."""

    def unpack(self, states: torch.Tensor) -> torch.Tensor:
        """Turn [1, heads, tokens, size] into [rows, heads, width, size]; a row's last token stands behind its end.

        Picking tokens keeps their numbers only for backward, where copying them into zeros keeps the tokens too.
        """
        joined = states.transpose(1, 2)[0]
        lines = joined.index_select(0, self.token_of_slot.flatten())
        return lines.view(*self.filled.shape, *joined.shape[1:]).transpose(1, 2)

    def unpack_mask(self, mask: torch.Tensor) -> torch.Tensor:
        """Turn a mask [1, 1, tokens, tokens] into [rows, 1, width, width]; nothing sees what is behind an end."""
        if mask not in self.masks:
            lines = mask[0, 0][self.token_of_slot[:, :, None], self.token_of_slot[:, None, :]]
            self.masks[mask] = (lines & self.filled[:, None, :])[:, None]
        return self.masks[mask]

    def repack(self, lines: torch.Tensor) -> torch.Tensor:
        """Turn [rows, width, heads, size] into [1, tokens, heads, size]."""
        return lines.flatten(0, 1).index_select(0, self.slot_of_token)[None]


@lru_cache(maxsize=1)
def packed_layout(position_ids: torch.Tensor) -> PackedLayout | None:
    """Return the layout of rows whose positions [1, tokens] start anew; None where it would not save anything.

    All layers of a forward pass ask for the same tensor's, so that it is found once.
    """
    tokens = torch.arange(position_ids.shape[1], device=position_ids.device)
    starts = torch.nonzero(position_ids[0] == 0).flatten()
    lengths = torch.diff(starts, append=starts.new_tensor([len(tokens)]))
    width = int(lengths.max()) if len(lengths) else 0
    if len(starts) * width**2 >= len(tokens) ** 2:
        return None
    rows = torch.repeat_interleave(torch.arange(len(starts), device=starts.device), lengths)
    steps = torch.arange(width, device=starts.device)
    return PackedLayout(
        slot_of_token=rows * width + tokens - starts[rows],
        token_of_slot=starts[:, None] + torch.minimum(steps[None], lengths[:, None] - 1),
        filled=steps[None] < lengths[:, None],
    )


def unpacked_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """Return what transformers' SDPA attention returns."""
    layout = _layout_of(query, key, settings.get("position_ids"))
    if attention_mask is None or layout is None:
        made: tuple[torch.Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
        return made
    dtype = torch.float32 if layout.filled.shape[1] <= _FP32_MAX_ROW_TOKENS else query.dtype
    lines = [layout.unpack(states).to(dtype) for states in (query, key, value)]
    with torch.autocast(query.device.type, enabled=False):
        output, _ = sdpa_attention_forward(module, *lines, layout.unpack_mask(attention_mask), **settings)
    return layout.repack(output).to(query.dtype), None


def _layout_of(query: torch.Tensor, key: torch.Tensor, position_ids: torch.Tensor | None) -> PackedLayout | None:
    """Return the layout of a batch that is one line of joined rows; a cache's keys would be more than its queries."""
    if position_ids is None or position_ids.shape != (1, query.shape[2]) or query.shape[2] != key.shape[2]:
        return None
    return packed_layout(position_ids) if query.shape[0] == 1 else None


AttentionInterface.register(UNPACKED_SDPA, unpacked_attention)
AttentionMaskInterface.register(UNPACKED_SDPA, sdpa_mask)
