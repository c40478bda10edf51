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

APART: Final = "sdpa_apart"
"""The name under which transformers knows it."""
_SHORT: Final = 256
"""Rows up to this are computed in fp32: torch 2.15's bf16 kernel takes 17 ms backward where the fp32 one takes 7
(16 rows of 60 tokens, 9 heads of 64, AVX512-BF16); from 512 tokens on it is the faster one."""


def lay_rows_apart(model: Any) -> None:
    """Use it in place of SDPA in a model on a CPU, if its class takes its attention by name."""
    if model.device.type == "cpu" and model.config._attn_implementation == "sdpa" and model._supports_attention_backend:
        model.set_attn_implementation(APART)


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the tokens of joined rows go when each row gets a line of its own."""

    places: torch.Tensor
    """Place of each token in the flattened lines [tokens]."""
    tokens: torch.Tensor
    """Token at each place of the lines [rows, width]; a row's last token again where the row has ended."""
    filled: torch.Tensor
    """Whether the row has not ended there [rows, width]."""
    masks: dict[torch.Tensor, torch.Tensor] = field(default_factory=dict)
    """Masks laid apart, by what they were made of: full and sliding layers have one each. They go with the layout."""

    def lay_apart(self, states: torch.Tensor) -> torch.Tensor:
        """Turn [1, heads, tokens, size] into [rows, heads, width, size]; a row's last token stands behind its end.

        Picking tokens keeps their numbers only for backward, where copying them into zeros keeps the tokens too.
        """
        joined = states.transpose(1, 2)[0]
        lines = joined.index_select(0, self.tokens.flatten())
        return lines.view(*self.filled.shape, *joined.shape[1:]).transpose(1, 2)

    def mask_apart(self, mask: torch.Tensor) -> torch.Tensor:
        """Turn a mask [1, 1, tokens, tokens] into [rows, 1, width, width]; nothing sees what is behind an end."""
        if mask not in self.masks:
            lines = mask[0, 0][self.tokens[:, :, None], self.tokens[:, None, :]]
            self.masks[mask] = (lines & self.filled[:, None, :])[:, None]
        return self.masks[mask]

    def join(self, lines: torch.Tensor) -> torch.Tensor:
        """Turn [rows, width, heads, size] into [1, tokens, heads, size]."""
        return lines.flatten(0, 1).index_select(0, self.places)[None]


@lru_cache(maxsize=1)
def lay_out(position_ids: torch.Tensor) -> Layout | None:
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
    return Layout(
        places=rows * width + tokens - starts[rows],
        tokens=starts[:, None] + torch.minimum(steps[None], lengths[:, None] - 1),
        filled=steps[None] < lengths[:, None],
    )


def attend(
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
    dtype = torch.float32 if layout.filled.shape[1] <= _SHORT else query.dtype
    lines = [layout.lay_apart(states).to(dtype) for states in (query, key, value)]
    with torch.autocast(query.device.type, enabled=False):
        output, _ = sdpa_attention_forward(module, *lines, layout.mask_apart(attention_mask), **settings)
    return layout.join(output).to(query.dtype), None


def _layout_of(query: torch.Tensor, key: torch.Tensor, position_ids: torch.Tensor | None) -> Layout | None:
    """Return the layout of a batch that is one line of joined rows; a cache's keys would be more than its queries."""
    if position_ids is None or position_ids.shape != (1, query.shape[2]) or query.shape[2] != key.shape[2]:
        return None
    return lay_out(position_ids) if query.shape[0] == 1 else None


AttentionInterface.register(APART, attend)
AttentionMaskInterface.register(APART, sdpa_mask)
