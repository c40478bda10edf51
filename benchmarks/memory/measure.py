"""Measures one combination: what a forward pass leaves for backward, and the peak of a whole training step."""

import gc
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.memory.combinations import Combination
from benchmarks.memory.models import load_trainable, make_measured_loop, measured_step, token_rows, write_model
from benchmarks.memory.trace import traced
from qlora_trainer.data.batching import collate
from qlora_trainer.model.unpacked_attention import packed_layout
from qlora_trainer.training.loop import TrainingLoop


@dataclass(frozen=True)
class Measured:
    """Bytes of torch's allocator above what weights, adapter and optimizer state take."""

    kept: int
    """At the end of a forward pass: what backward waits for."""
    peak: int
    """The most during forward and backward of a micro-batch, whose gradients are there already."""
    step: int
    """The most during a whole step of the trainer's loop, beside gradients: forward, backward, clipping, AdamW."""


def measure(combination: Combination) -> Measured:
    """Take three steps of the trainer's own loop, and trace what follows the first."""
    with tempfile.TemporaryDirectory() as folder:
        write_model(combination, Path(folder))
        tuned = load_trainable(combination, Path(folder))
    loop = make_measured_loop(combination, tuned)
    loop.step(0)  # the optimizer's state is made
    _forget()
    with traced() as whole:
        loop.step(measured_step(combination))
    return _micro_batch(loop, combination, whole.peak)


def _micro_batch(loop: TrainingLoop, combination: Combination, whole: int) -> Measured:
    rows = token_rows(combination)
    batch = collate(rows, loop.trainable.device, packing=combination.packing)
    weight = torch.ones(()) / sum(row.label_count for row in rows)
    torch.autograd.backward(loop.trainable.loss_sum(batch, weight))
    gradients = sum(parameter.grad.nbytes for parameter in loop.trainable.parameters() if parameter.grad is not None)
    _forget()
    with traced() as forward:
        loss = loop.trainable.loss_sum(batch, weight)
    with traced() as backward:
        torch.autograd.backward(loss)
    peak = max(forward.peak, forward.left + backward.peak)
    return Measured(kept=forward.left, peak=peak, step=whole - gradients)


def _forget() -> None:
    """Free what earlier passes left: a trace knows only what is taken while it runs."""
    packed_layout.cache_clear()
    gc.collect()
