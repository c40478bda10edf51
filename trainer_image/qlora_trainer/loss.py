"""The cross-entropy of a language model's head, in pieces, so that memory does not grow with rows times vocabulary."""

from collections.abc import Callable
from typing import Any, Final, TypeAlias

import torch
from torch.nn import functional

Head: TypeAlias = Callable[[torch.Tensor], torch.Tensor]

LOGITS_PER_CHUNK: Final = 1 << 25
"""Logits alive at once: 128 MiB in fp32, 682 positions of a vocabulary of 49,152."""


def positions_per_chunk(vocabulary: int) -> int:
    """Return how many positions are projected onto the vocabulary at a time."""
    return max(LOGITS_PER_CHUNK // vocabulary, 1)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The sum of the losses; each chunk's gradient is taken while its logits are there, so nothing is recomputed."""

    @staticmethod
    def forward(  # noqa: PLR0913, PLR0917 (autograd passes by position)
        ctx: Any, hidden: torch.Tensor, labels: torch.Tensor, head: Head, chunk: int, weight: torch.Tensor
    ) -> torch.Tensor:
        gradient = torch.empty_like(hidden)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(labels), chunk):
            part = hidden[start : start + chunk].detach().requires_grad_()
            with torch.enable_grad():
                loss = token_losses(head(part), labels[start : start + chunk]).sum() * weight
            (gradient[start : start + chunk],) = torch.autograd.grad(loss, part)
            total += loss.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient.float() * outputs[0]).to(gradient.dtype), None, None, None, None


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of each position; the softmax is in fp32 whatever the model computes in."""
    return functional.cross_entropy(logits.float(), labels, reduction="none")


def chunked_cross_entropy(
    hidden: torch.Tensor, labels: torch.Tensor, head: Head, chunk: int, weight: torch.Tensor
) -> torch.Tensor:
    """Return the summed cross-entropy of hidden states [positions, width] with a frozen head, times a weight.

    The weight is in before the gradient is rounded to 16 bits, as it is in torch's own backward.
    """
    total: torch.Tensor = _ChunkedCrossEntropy.apply(hidden, labels, head, chunk, weight)
    return total


@torch.no_grad()
def chunked_statistics(
    hidden: torch.Tensor, labels: torch.Tensor, head: Head, chunk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return for each label its loss [positions], in fp64, and whether it is the model's first choice [positions]."""
    losses, hits = [], []
    for start in range(0, len(labels), chunk):
        logits, wanted = head(hidden[start : start + chunk]), labels[start : start + chunk]
        losses.append(token_losses(logits, wanted).double())
        hits.append(logits.argmax(dim=-1) == wanted)
    return torch.cat(losses), torch.cat(hits)
