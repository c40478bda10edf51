"""Measures one combination: bytes saved for backward, and the peak of a complete training step."""

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
    """Bytes of torch's allocator above those of weights, adapter and optimizer state."""

    kept: int
    """At the end of a forward pass: tensors saved for backward."""
    peak: int
    """Peak during forward and backward of a micro-batch, with gradients allocated before."""
    step: int
    """Peak during a complete step of the training loop, without gradients: forward, backward, clipping, AdamW."""


def measure(combination: Combination) -> Measured:
    """Run steps of the trainer's own loop, and trace those after the first."""
    with tempfile.TemporaryDirectory() as folder:
        write_model(combination, Path(folder))
        trainable = load_trainable(combination, Path(folder))
    loop = make_measured_loop(combination, trainable)
    loop.step(0)  # allocates the optimizer state
    _free_memory()
    with traced() as step:
        loop.step(measured_step(combination))
    return _micro_batch(loop, combination, step.peak)


def _micro_batch(loop: TrainingLoop, combination: Combination, step_peak: int) -> Measured:
    rows = token_rows(combination)
    batch = collate(rows, loop.trainable.device, packing=combination.packing)
    weight = torch.ones(()) / sum(row.label_count for row in rows)
    torch.autograd.backward(loop.trainable.loss_sum(batch, weight))
    gradients = sum(parameter.grad.nbytes for parameter in loop.trainable.parameters() if parameter.grad is not None)
    _free_memory()
    with traced() as forward:
        loss = loop.trainable.loss_sum(batch, weight)
    with traced() as backward:
        torch.autograd.backward(loss)
    peak = max(forward.peak, forward.left + backward.peak)
    return Measured(kept=forward.left, peak=peak, step=step_peak - gradients)


def _free_memory() -> None:
    """Free what earlier steps left: a trace sees only allocations during its own time."""
    packed_layout.cache_clear()
    gc.collect()
