"""Which rows a step learns from, and how they are laid out for one forward pass; pure but for making tensors."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import Final

import torch

from qlora_trainer.data.tokenization import TokenRow

MAX_PACKED_TOKENS: Final = 4096
"""Tokens joined into one sequence at most, unless one row is longer: attention's mask grows with their square."""


@dataclass(frozen=True)
class Batch:
    """The inputs of one forward pass; labels belong to the chosen positions of the flattened batch."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor | None
    attention_mask: torch.Tensor | None
    label_positions: torch.Tensor
    """Positions of the flattened batch whose next token is learned."""
    labels: torch.Tensor
    """Those next tokens."""


@lru_cache(maxsize=2)
def epoch_permutation(epoch: int, rows: int, seed: int) -> tuple[int, ...]:
    """Return the order of the rows in an epoch: a function of its arguments, whatever ran before."""
    generator = torch.Generator().manual_seed((seed << 20) + epoch)
    return tuple(torch.randperm(rows, generator=generator).tolist())


def sample_step(step: int, rows: int, global_batch: int, seed: int) -> tuple[int, ...]:
    """Return the rows of an optimizer step, counted from 0; an epoch's last step may have fewer."""
    epoch, place = divmod(step, ceil(rows / global_batch))
    return epoch_permutation(epoch, rows, seed)[place * global_batch : (place + 1) * global_batch]


def split_micro_batches(rows: Sequence[TokenRow], size: int, *, packing: bool) -> list[Sequence[TokenRow]]:
    """Divide rows into forward passes: at most `size` rows, and if they are joined at most PACK_TOKENS tokens."""
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
    """Return each pass's rows and whether they count, filled up with a row that does not: passes are made in step."""
    return [(group, True) for group in groups] + [([filler], False)] * (passes - len(groups))


def collate(rows: Sequence[TokenRow], device: torch.device, *, packing: bool) -> Batch:
    """Lay rows out for one forward pass."""
    return _collate_packed(rows, device) if packing else _collate_padded(rows, device)


def _collate_packed(rows: Sequence[TokenRow], device: torch.device) -> Batch:
    """Join rows; positions that start anew keep them apart, but only without a mask and without a cache."""
    ids = [token for row in rows for token in row.input_ids]
    positions = [position for row in rows for position in range(len(row.input_ids))]
    chosen: list[int] = []
    start = 0
    for row in rows:
        chosen += _label_positions(row, start)
        start += len(row.input_ids)
    return Batch(
        input_ids=torch.tensor([ids], device=device),
        position_ids=torch.tensor([positions], device=device),
        attention_mask=None,
        label_positions=torch.tensor(chosen, dtype=torch.long, device=device),
        labels=torch.tensor([ids[position + 1] for position in chosen], dtype=torch.long, device=device),
    )


def _collate_padded(rows: Sequence[TokenRow], device: torch.device) -> Batch:
    """Fill rows up to the longest; padding is known by its place, so any token may fill it."""
    width = max(len(row.input_ids) for row in rows)
    ids = [[*row.input_ids, *([0] * (width - len(row.input_ids)))] for row in rows]
    mask = [[1] * len(row.input_ids) + [0] * (width - len(row.input_ids)) for row in rows]
    chosen = [position for number, row in enumerate(rows) for position in _label_positions(row, number * width)]
    flat = [token for row in ids for token in row]
    return Batch(
        input_ids=torch.tensor(ids, device=device),
        position_ids=None,
        attention_mask=torch.tensor(mask, device=device),
        label_positions=torch.tensor(chosen, dtype=torch.long, device=device),
        labels=torch.tensor([flat[position + 1] for position in chosen], dtype=torch.long, device=device),
    )


def row_lengths(batch: Batch) -> torch.Tensor:
    """Return for each token of a batch how many its own row has, joined or not; padding belongs to no row."""
    if batch.position_ids is None:
        mask = torch.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask
        return mask * mask.sum(dim=1, keepdim=True)
    row = (batch.position_ids[0] == 0).cumsum(dim=0) - 1
    return torch.bincount(row)[row][None]


def _label_positions(row: TokenRow, offset: int) -> Iterator[int]:
    """Yield the positions whose next token is learned, in a batch where the row starts at an offset."""
    return (offset + position - 1 for start, end in row.label_spans for position in range(start, end))
