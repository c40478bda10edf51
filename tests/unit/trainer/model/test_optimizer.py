"""Optimizers: choice by request and device, training, and restored state."""

import copy

import bitsandbytes
import pytest
import torch

from qlora_api.optimizers import OPTIMIZERS
from qlora_api.v1alpha1 import TrainingSpec
from qlora_trainer.model.optimizer import OptimizerKind, choose_optimizer, make_optimizer, parameter_groups
from qlora_trainer.training.checkpoint_store import RunFingerprint
from qlora_trainer.training.state import copy_optimizer, load_optimizer

CPU_KINDS = (OptimizerKind.ADAMW, OptimizerKind.ADAMW_8BIT)


@pytest.mark.parametrize(
    ("requested", "device", "kind", "reason"),
    [
        ("auto", "cpu", OptimizerKind.ADAMW, "state is small"),
        ("auto", "cuda", OptimizerKind.ADAMW_FUSED, "state is small"),
        ("adamw", "cuda", OptimizerKind.ADAMW_FUSED, "spec.training.optimizer"),
        ("adamw8bit", "cpu", OptimizerKind.ADAMW_8BIT, "spec.training.optimizer"),
        ("pagedAdamw", "cpu", OptimizerKind.ADAMW, "pagedAdamw without pages"),
        ("pagedAdamw8bit", "cpu", OptimizerKind.ADAMW_8BIT, "pagedAdamw8bit without pages"),
        ("pagedAdamw", "cuda", OptimizerKind.PAGED_ADAMW, "spec.training.optimizer"),
        ("pagedAdamw8bit", "cuda", OptimizerKind.PAGED_ADAMW_8BIT, "spec.training.optimizer"),
    ],
)
def test_choose_optimizer_by_request_and_device(requested, device, kind, reason):
    found, why = choose_optimizer(requested, device)
    assert (found, reason in why) == (kind, True)


def parameters() -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    # bitsandbytes keeps the state of fewer than 4,096 numbers in 32 bits.
    return [torch.nn.Parameter(torch.randn(96, 96)), torch.nn.Parameter(torch.randn(96))]


def take_steps(optimizer: torch.optim.Optimizer, weights: list[torch.nn.Parameter], steps: range) -> None:
    """Move the weights towards zero; a step is a function of its number."""
    for step in steps:
        for weight in weights:
            noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step))
            weight.grad = weight.detach() + 0.1 * noise
        optimizer.step()


@pytest.mark.parametrize("kind", CPU_KINDS)
def test_each_optimizer_trains_and_stores_its_state_type(kind):
    weights = parameters()
    optimizer = make_optimizer(weights, TrainingSpec(learning_rate=0.05), kind)
    before = float(weights[0].detach().norm())
    take_steps(optimizer, weights, range(20))
    assert float(weights[0].detach().norm()) < 0.5 * before
    stored = {value.dtype for value in optimizer.state[weights[0]].values() if torch.is_tensor(value) and value.ndim}
    assert (torch.uint8 in stored) == (kind == OptimizerKind.ADAMW_8BIT)


@pytest.mark.parametrize("kind", CPU_KINDS)
def test_restored_optimizer_state_continues_bit_for_bit(kind):
    uninterrupted, resumed, training = parameters(), parameters(), TrainingSpec(learning_rate=0.05)
    take_steps(make_optimizer(uninterrupted, training, kind), uninterrupted, range(6))
    first = make_optimizer(resumed, training, kind)
    take_steps(first, resumed, range(3))
    second = make_optimizer(resumed, training, kind)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    take_steps(second, resumed, range(3, 6))
    assert all(torch.equal(one, other) for one, other in zip(uninterrupted, resumed, strict=True))


def test_norms_and_biases_are_not_decayed():
    matrix, vector = parameters()
    groups = parameter_groups([matrix, vector], 0.1)
    assert [(group["params"][0] is matrix, group["weight_decay"]) for group in groups] == [(True, 0.1), (False, 0.0)]
    assert len(parameter_groups([matrix], 0.1)) == 1


@pytest.mark.parametrize("kind", OptimizerKind)
def test_fingerprint_accepts_former_optimizer_names(kind):
    former = kind.value.replace("pagedAdamw", "paged_adamw")
    stored = {"digest": "0" * 16, "totalSteps": 4, "rows": 12, "optimizer": former}
    assert RunFingerprint.model_validate(stored) == RunFingerprint.model_validate(stored | {"optimizer": kind.value})


def test_every_optimizer_is_implemented():
    assert {kind.optimizer.name for kind in OptimizerKind} == set(OPTIMIZERS)


class PagedAdamW(bitsandbytes.optim.AdamW8bit):
    """AdamW whose large states are in pages, as bitsandbytes' paged ones are on a GPU."""

    def __init__(self, weights: list[torch.nn.Parameter]) -> None:
        super().__init__(weights)
        self.is_paged = True
        self.paged: list[int] = []

    def get_state_buffer(self, p: torch.nn.Parameter, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        buffer = torch.zeros_like(p, dtype=dtype)
        self.paged.append(buffer.data_ptr())
        return buffer


def test_state_of_paged_optimizer_is_in_pages_after_a_resume():
    weights = parameters()
    optimizer = PagedAdamW(weights)
    take_steps(optimizer, weights, range(2))
    state = copy_optimizer(optimizer)
    resumed = PagedAdamW(copies := copy.deepcopy(weights))
    load_optimizer(resumed, state)
    pages = {resumed.state[weight][name].data_ptr() for weight in copies for name in ("state1", "state2")}
    assert pages == set(resumed.paged)
    take_steps(optimizer, weights, range(2, 4))
    take_steps(resumed, copies, range(2, 4))
    assert all(torch.equal(one, other) for one, other in zip(weights, copies, strict=True))
