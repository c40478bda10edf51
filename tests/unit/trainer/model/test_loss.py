"""Chunked cross-entropy: values and gradients equal those of torch."""

import pytest
import torch
from torch.nn import functional

from qlora_trainer.model.loss import Head, chunked_cross_entropy, chunked_statistics


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_chunked_loss_and_gradients_equal_those_of_torch(chunk, trainable):
    torch.manual_seed(0)
    hidden, labels = torch.randn(23, 16, requires_grad=True), torch.randint(0, 50, (23,))
    project = torch.nn.Linear(16, 50).requires_grad_(trainable)
    head = Head(project, chunk, tuple(project.parameters()) if trainable else ())
    inputs = [hidden, *head.trainable_weights]
    expected = functional.cross_entropy(project(hidden), labels, reduction="sum")
    gradients = torch.autograd.grad(expected / 3, inputs)
    found = chunked_cross_entropy(hidden, labels, head, torch.ones(()) / 6)
    torch.testing.assert_close(found, expected / 6)
    for one, other in zip(torch.autograd.grad(found * 2, inputs), gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_chunked_statistics_equal_those_of_torch(chunk):
    torch.manual_seed(0)
    hidden, labels, project = torch.randn(23, 16), torch.randint(0, 50, (23,)), torch.nn.Linear(16, 50)
    losses, hits = chunked_statistics(hidden, labels, Head(project, chunk))
    torch.testing.assert_close(losses.float(), functional.cross_entropy(project(hidden), labels, reduction="none"))
    assert torch.equal(hits, project(hidden).argmax(-1) == labels)
