"""What all processes of a run must have in common: settings that the hardware decides, and the start weights."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from qlora_api.reasons import Reason
from qlora_trainer.distributed.world import World
from qlora_trainer.errors import RunError
from qlora_trainer.training.agreement import agree_on_settings, check_same_start, digest_of_weights
from tests.unit.trainer.tiny import CPU
from tests.unit.trainer.tuned import SETTINGS, SINGLE_PROCESS, make_trainable

A100 = ("A100", "bfloat16", "sdpa")
T4 = ("T4", "float16", "sdpa")
BF16 = dataclasses.replace(SETTINGS, dtype=torch.bfloat16)


class OtherRanks(World):
    """A world whose other ranks answer every collective operation alike."""

    def __init__(self, answers: Sequence[Any] = (), flag: bool = False) -> None:
        super().__init__(CPU, rank=0, size=1 + len(answers))
        object.__setattr__(self, "answers", tuple(answers))
        object.__setattr__(self, "flag", flag)

    def all_gather(self, value: Any) -> tuple[Any, ...]:
        return (value, *self.answers)  # type: ignore[attr-defined]

    def all_reduce_any(self, *flags: bool) -> tuple[bool, ...]:
        return tuple(flag or self.flag for flag in flags)  # type: ignore[attr-defined]


def test_trap_49_processes_that_compute_differently_are_refused():
    with pytest.raises(RunError, match=r"spec\.resources\.gpuProduct: .*A100: bfloat16, sdpa; T4: float16") as caught:
        agree_on_settings(OtherRanks([A100, T4]), BF16, "A100")
    assert caught.value.reason == Reason.INVALID_SPEC


def test_processes_on_gpus_of_another_name_that_compute_alike_agree():
    assert agree_on_settings(OtherRanks([("H100", "bfloat16", "sdpa")]), BF16, "A100") is BF16


def test_one_process_without_memory_makes_all_recompute_activations():
    assert agree_on_settings(SINGLE_PROCESS, SETTINGS, "CPU") is SETTINGS
    found = agree_on_settings(OtherRanks([A100], flag=True), BF16, "A100")
    assert found.gradient_checkpointing
    assert "another process" in found.reasons["gradient checkpointing"]


def test_processes_that_start_from_other_weights_are_refused():
    trainable = make_trainable()
    check_same_start(OtherRanks([digest_of_weights(trainable)]), trainable)
    with torch.no_grad():
        trainable.parameters()[0][0, 0] += 1e-3
    with pytest.raises(RunError, match=r"spec\.lora\.init: the processes of this run initialized different adapters"):
        check_same_start(OtherRanks([digest_of_weights(make_trainable())]), trainable)
