"""NEFTune: noise on the embeddings during training, to reduce overfitting to exact wordings (Jain et al. 2023)."""

import contextlib
from collections.abc import Iterator
from math import sqrt
from typing import Any

import torch

from qlora_trainer.data.batching import Batch, row_lengths


@contextlib.contextmanager
def noisy_embeddings(model: Any, alpha: float, batch: Batch) -> Iterator[None]:
    """Add noise to the embeddings of a batch's forward passes; none if alpha is 0."""
    if alpha == 0:
        yield
        return
    lengths = row_lengths(batch)

    def add(_: Any, __: Any, embeddings: torch.Tensor) -> torch.Tensor:
        return embeddings + noise_for(embeddings, lengths, alpha)

    hook = model.get_input_embeddings().register_forward_hook(add)
    try:
        yield
    finally:
        hook.remove()


def noise_for(embeddings: torch.Tensor, lengths: torch.Tensor, alpha: float) -> torch.Tensor:
    """Return uniform noise [rows, tokens, width] in ±alpha / sqrt(row length * width).

    Args:
        embeddings: Embeddings of a batch [rows, tokens, width].
        lengths: Length of each token's own row [rows, tokens]; 0 for padding.
        alpha: Strength of the noise, 5 to 15 in the paper.

    """
    scale = alpha / sqrt(embeddings.shape[-1]) * lengths.clamp_min(1).rsqrt()
    noise = torch.empty_like(embeddings, dtype=torch.float32).uniform_(-1, 1) * scale[..., None]
    return noise.to(embeddings.dtype)
