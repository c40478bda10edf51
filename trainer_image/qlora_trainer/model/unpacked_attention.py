"""SDPA of packed rows: computed as a padded batch of rows instead of one long, mostly masked sequence.

SDPA computes every pair of positions, whatever the mask says. Sixteen packed rows of 40 tokens are 410,000 pairs; as a
batch they are 26,000.
"""

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

UNPACKED_SDPA: Final = "sdpa_unpacked"
"""Name of this attention in transformers' registry."""
_FP32_MAX_ROW_TOKENS: Final = 256
"""Maximum row length that a CPU computes in fp32: torch 2.15's bf16 kernel takes 17 ms backward, the fp32 one 7
(16 rows of 60 tokens, 9 heads of 64, AVX512-BF16); from 512 tokens on the bf16 kernel is faster."""


def use_unpacked_sdpa(model: Any) -> None:
    """Replace SDPA in a model, if its class supports custom attention functions."""
    if model.config._attn_implementation == "sdpa" and model._supports_attention_backend:
        model.set_attn_implementation(UNPACKED_SDPA)


@dataclass(frozen=True, eq=False)
class PackedLayout:
    """Index mapping between packed rows [tokens] and a padded batch [rows, width]."""

    slot_of_token: torch.Tensor
    """Index of each token in the flattened batch [tokens]."""
    token_of_slot: torch.Tensor
    """Index of the token at each position [rows, width]; padding repeats the last token of the row."""
    filled: torch.Tensor
    """False for padding [rows, width]."""
    masks: dict[torch.Tensor, torch.Tensor] = field(default_factory=dict)
    """Cached unpacked masks by packed mask: layers with full and with sliding attention have one each."""

    def unpack(self, states: torch.Tensor) -> torch.Tensor:
        """Unpack [1, heads, tokens, size] into [rows, heads, width, size]; padding repeats the last token of a row.

        index_select saves only the indices for backward; a copy into zeros would save the states as well.
        """
        packed = states.transpose(1, 2)[0]
        unpacked = packed.index_select(0, self.token_of_slot.flatten())
        return unpacked.view(*self.filled.shape, *packed.shape[1:]).transpose(1, 2)

    def unpack_mask(self, mask: torch.Tensor) -> torch.Tensor:
        """Unpack a mask [1, 1, tokens, tokens] into [rows, 1, width, width]; padding is masked."""
        if mask not in self.masks:
            unpacked = mask[0, 0][self.token_of_slot[:, :, None], self.token_of_slot[:, None, :]]
            self.masks[mask] = (unpacked & self.filled[:, None, :])[:, None]
        return self.masks[mask]

    def repack(self, states: torch.Tensor) -> torch.Tensor:
        """Pack [rows, width, heads, size] into [1, tokens, heads, size]."""
        return states.flatten(0, 1).index_select(0, self.slot_of_token)[None]


@lru_cache(maxsize=1)
def packed_layout(position_ids: torch.Tensor) -> PackedLayout | None:
    """Return the layout of packed rows from their position ids [1, tokens]; None if unpacking would save nothing.

    The cache serves all layers of a forward pass, which share the tensor.
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
    """Compute what transformers' SDPA attention computes, with packed rows unpacked first."""
    layout = _layout_of(query, key, settings.get("position_ids"))
    if attention_mask is None or layout is None:
        result: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **settings
        )
        return result
    in_fp32 = query.device.type == "cpu" and layout.filled.shape[1] <= _FP32_MAX_ROW_TOKENS
    dtype = torch.float32 if in_fp32 else query.dtype
    unpacked = [layout.unpack(states).to(dtype) for states in (query, key, value)]
    with torch.autocast(query.device.type, enabled=False):
        output, _ = sdpa_attention_forward(module, *unpacked, layout.unpack_mask(attention_mask), **settings)
    return layout.repack(output).to(query.dtype), None


def _layout_of(query: torch.Tensor, key: torch.Tensor, position_ids: torch.Tensor | None) -> PackedLayout | None:
    """Return the layout of a batch of one packed sequence; None with a cache, which has more keys than queries."""
    if position_ids is None or position_ids.shape != (1, query.shape[2]) or query.shape[2] != key.shape[2]:
        return None
    return packed_layout(position_ids) if query.shape[0] == 1 else None


AttentionInterface.register(UNPACKED_SDPA, unpacked_attention)
AttentionMaskInterface.register(UNPACKED_SDPA, sdpa_mask)
