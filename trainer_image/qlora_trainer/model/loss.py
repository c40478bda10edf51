"""Chunked cross-entropy of a language model's head, so that memory does not grow with tokens times vocabulary."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.nn import functional

LOGITS_PER_CHUNK: Final = 1 << 25
"""Maximum number of logits in memory: 128 MiB in fp32, 682 positions of a vocabulary of 49,152."""


def positions_per_chunk(vocabulary: int) -> int:
    """Return how many positions are projected onto the vocabulary at a time."""
    return max(LOGITS_PER_CHUNK // vocabulary, 1)


@dataclass(frozen=True)
class Head:
    """Projects hidden states [positions, width] to logits [positions, vocabulary]."""

    project: Callable[[torch.Tensor], torch.Tensor]
    chunk: int
    """Positions per chunk."""
    trainable_weights: tuple[torch.Tensor, ...] = ()
    """Trainable weights of the projection, if any."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Summed loss; each chunk's gradients are computed with its logits in forward, so nothing is recomputed."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, labels: torch.Tensor, head: Head, weight: torch.Tensor, *weights: torch.Tensor
    ) -> torch.Tensor:
        gradient = torch.empty_like(hidden)
        weight_gradients = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in weights]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(labels), head.chunk):
            chunk = slice(start, start + head.chunk)
            part = hidden[chunk].detach().requires_grad_()
            with torch.enable_grad():
                loss = token_losses(head.project(part), labels[chunk]).sum() * weight
            gradient[chunk], *added = torch.autograd.grad(loss, [part, *weights])
            for summed, addend in zip(weight_gradients, added, strict=True):
                summed.add_(addend)
            total += loss.detach()
        ctx.save_for_backward(gradient, *weight_gradients)
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradient, *weight_gradients = ((saved.float() * outputs[0]).to(saved.dtype) for saved in ctx.saved_tensors)
        return gradient, None, None, None, *weight_gradients


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of each position [positions]; the softmax is always computed in fp32."""
    return functional.cross_entropy(logits.float(), labels, reduction="none")


def chunked_cross_entropy(hidden: torch.Tensor, labels: torch.Tensor, head: Head, weight: torch.Tensor) -> torch.Tensor:
    """Return the summed cross-entropy of hidden states [positions, width], times a scalar weight.

    The weight is applied before the gradient is rounded to 16 bits, as in torch's own backward.
    """
    total: torch.Tensor = _ChunkedCrossEntropy.apply(hidden, labels, head, weight, *head.trainable_weights)
    return total


@torch.no_grad()
def chunked_statistics(hidden: torch.Tensor, labels: torch.Tensor, head: Head) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of each label in fp64 [positions], and whether it is the top-1 prediction [positions]."""
    losses, hits = [], []
    for start in range(0, len(labels), head.chunk):
        chunk = slice(start, start + head.chunk)
        logits, targets = head.project(hidden[chunk]), labels[chunk]
        losses.append(token_losses(logits, targets).double())
        hits.append(logits.argmax(dim=-1) == targets)
    return torch.cat(losses), torch.cat(hits)
