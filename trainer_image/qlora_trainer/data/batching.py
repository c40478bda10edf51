"""Sampling, micro-batches and data collators: the rows of each optimizer step as tensors; pure functions."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import Final

import torch

from qlora_trainer.data.tokenization import TokenRow

MAX_PACKED_TOKENS: Final = 4096
"""Maximum length of a packed sequence, unless a single row is longer: the attention mask grows with its square."""


@dataclass(frozen=True)
class Batch:
    """The inputs of one forward pass; labels are indexed by position in the flattened batch."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor | None
    attention_mask: torch.Tensor | None
    label_positions: torch.Tensor
    """Positions in the flattened batch whose next token is a label [labels]."""
    labels: torch.Tensor
    """Token ids of these labels [labels]."""


@lru_cache(maxsize=2)
def epoch_permutation(epoch: int, rows: int, seed: int) -> tuple[int, ...]:
    """Return the order of the rows in an epoch; it depends on the arguments only, never on global random state."""
    generator = torch.Generator().manual_seed((seed << 20) + epoch)
    return tuple(torch.randperm(rows, generator=generator).tolist())


def sample_step(step: int, rows: int, global_batch: int, seed: int) -> tuple[int, ...]:
    """Return the row indices of an optimizer step, counted from 0; the last step of an epoch may have fewer."""
    epoch, index = divmod(step, ceil(rows / global_batch))
    return epoch_permutation(epoch, rows, seed)[index * global_batch : (index + 1) * global_batch]


def split_micro_batches(rows: Sequence[TokenRow], size: int, *, packing: bool) -> list[Sequence[TokenRow]]:
    """Split rows into micro-batches of at most `size` rows, and with packing of at most MAX_PACKED_TOKENS tokens."""
    groups: list[list[TokenRow]] = []
    tokens = 0
    for row in rows:
        full = not groups or len(groups[-1]) == size or (packing and tokens + len(row.input_ids) > MAX_PACKED_TOKENS)
        if full:
            groups.append([])
            tokens = 0
        groups[-1].append(row)
        tokens += len(row.input_ids)
    return list(groups)


def pad_passes(
    groups: list[Sequence[TokenRow]], passes: int, filler: TokenRow
) -> list[tuple[Sequence[TokenRow], bool]]:
    """Pad to `passes` micro-batches, since all processes must run as many; the flag is False for filler ones."""
    return [(group, True) for group in groups] + [([filler], False)] * (passes - len(groups))


def collate(rows: Sequence[TokenRow], device: torch.device, *, packing: bool) -> Batch:
    """Collate rows for one forward pass, packed into one sequence or padded to the longest row."""
    return _collate_packed(rows, device) if packing else _collate_padded(rows, device)


def _collate_packed(rows: Sequence[TokenRow], device: torch.device) -> Batch:
    """Pack rows; restarting position ids separate them in attention, but only without a mask and without a cache."""
    ids = [token for row in rows for token in row.input_ids]
    positions = [position for row in rows for position in range(len(row.input_ids))]
    label_positions: list[int] = []
    start = 0
    for row in rows:
        label_positions += _label_positions(row, start)
        start += len(row.input_ids)
    return Batch(
        input_ids=torch.tensor([ids], device=device),
        position_ids=torch.tensor([positions], device=device),
        attention_mask=None,
        label_positions=torch.tensor(label_positions, dtype=torch.long, device=device),
        labels=torch.tensor([ids[position + 1] for position in label_positions], dtype=torch.long, device=device),
    )


def _collate_padded(rows: Sequence[TokenRow], device: torch.device) -> Batch:
    """Pad rows to the longest one; the mask identifies padding by position, so any token id may fill it."""
    width = max(len(row.input_ids) for row in rows)
    ids = [[*row.input_ids, *([0] * (width - len(row.input_ids)))] for row in rows]
    mask = [[1] * len(row.input_ids) + [0] * (width - len(row.input_ids)) for row in rows]
    label_positions = [
        position for number, row in enumerate(rows) for position in _label_positions(row, number * width)
    ]
    flat = [token for row in ids for token in row]
    return Batch(
        input_ids=torch.tensor(ids, device=device),
        position_ids=None,
        attention_mask=torch.tensor(mask, device=device),
        label_positions=torch.tensor(label_positions, dtype=torch.long, device=device),
        labels=torch.tensor([flat[position + 1] for position in label_positions], dtype=torch.long, device=device),
    )


def row_lengths(batch: Batch) -> torch.Tensor:
    """Return the length of each token's own row, packed or padded [rows, tokens]; 0 for padding."""
    if batch.position_ids is None:
        mask = torch.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask
        return mask * mask.sum(dim=1, keepdim=True)
    row = (batch.position_ids[0] == 0).cumsum(dim=0) - 1
    return torch.bincount(row)[row][None]


def _label_positions(row: TokenRow, offset: int) -> Iterator[int]:
    """Yield the positions whose next token is a label, in a batch where the row starts at an offset."""
    return (offset + position - 1 for start, end in row.label_spans for position in range(start, end))
