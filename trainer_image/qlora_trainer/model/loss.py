"""The cross-entropy of a language model's head, in pieces, so that memory does not grow with rows times vocabulary."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.nn import functional

LOGITS_PER_CHUNK: Final = 1 << 25
"""Logits alive at once: 128 MiB in fp32, 682 positions of a vocabulary of 49,152."""


def positions_per_chunk(vocabulary: int) -> int:
    """Return how many positions are projected onto the vocabulary at a time."""
    return max(LOGITS_PER_CHUNK // vocabulary, 1)


@dataclass(frozen=True)
class Head:
    """What turns hidden states [positions, width] into logits [positions, vocabulary]."""

    project: Callable[[torch.Tensor], torch.Tensor]
    chunk: int
    """Positions at a time."""
    trainable_weights: tuple[torch.Tensor, ...] = ()
    """Its weights that learn, if any do."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The sum of the losses; each chunk's gradients are taken while its logits are there, so nothing is recomputed."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, labels: torch.Tensor, head: Head, weight: torch.Tensor, *learned: torch.Tensor
    ) -> torch.Tensor:
        gradient = torch.empty_like(hidden)
        of_learned = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in learned]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(labels), head.chunk):
            here = slice(start, start + head.chunk)
            part = hidden[here].detach().requires_grad_()
            with torch.enable_grad():
                loss = token_losses(head.project(part), labels[here]).sum() * weight
            gradient[here], *added = torch.autograd.grad(loss, [part, *learned])
            for summed, addend in zip(of_learned, added, strict=True):
                summed.add_(addend)
            total += loss.detach()
        ctx.save_for_backward(gradient, *of_learned)
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradient, *of_learned = ((saved.float() * outputs[0]).to(saved.dtype) for saved in ctx.saved_tensors)
        return gradient, None, None, None, *of_learned


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of each position; the softmax is in fp32 whatever the model computes in."""
    return functional.cross_entropy(logits.float(), labels, reduction="none")


def chunked_cross_entropy(hidden: torch.Tensor, labels: torch.Tensor, head: Head, weight: torch.Tensor) -> torch.Tensor:
    """Return the summed cross-entropy of hidden states [positions, width], times a weight.

    The weight is in before the gradient is rounded to 16 bits, as it is in torch's own backward.
    """
    total: torch.Tensor = _ChunkedCrossEntropy.apply(hidden, labels, head, weight, *head.trainable_weights)
    return total


@torch.no_grad()
def chunked_statistics(hidden: torch.Tensor, labels: torch.Tensor, head: Head) -> tuple[torch.Tensor, torch.Tensor]:
    """Return for each label its loss [positions], in fp64, and whether it is the model's first choice [positions]."""
    losses, hits = [], []
    for start in range(0, len(labels), head.chunk):
        here = slice(start, start + head.chunk)
        logits, wanted = head.project(hidden[here]), labels[here]
        losses.append(token_losses(logits, wanted).double())
        hits.append(logits.argmax(dim=-1) == wanted)
    return torch.cat(losses), torch.cat(hits)
