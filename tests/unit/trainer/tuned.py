"""A tiny model with an adapter, rows of random tokens, and a loop over them."""

from pathlib import Path

import torch

from qlora_api.report import AdapterRecord, StepRecord
from qlora_api.v1alpha1 import LoraSpec, QuantizationSpec, TrainingSpec
from qlora_trainer.data.tokenization import TokenRow
from qlora_trainer.distributed.world import World
from qlora_trainer.model.base_model import Tuned, tune
from qlora_trainer.model.optimizer import Kind
from qlora_trainer.model.runtime_settings import Choices
from qlora_trainer.runtime.shutdown import StopFlag
from qlora_trainer.training.loop import Loop, Schedule, Watcher, make_loop
from tests.unit.trainer.tiny import CPU, make_model

DEAF = Watcher(lambda _: None, lambda _: None, lambda: None, lambda *_: False, lambda *_: None)
CHOICES = Choices(torch.float32, "sdpa", checkpointing=False, packing=True, optimizer=Kind.ADAMW, reasons={})
NF4 = QuantizationSpec(bits=4)
ALONE = World(CPU)


def token_rows(count: int = 16, seed: int = 0, spans: int = 1) -> tuple[TokenRow, ...]:
    """Rows that learn from their prompt's end on, or two spans of them as chats have."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(6, 24, (count,), generator=generator).tolist()
    return tuple(
        TokenRow(
            tuple(torch.randint(2, 384, (length,), generator=generator).tolist()),
            ((2 + number % 4, length),) if spans == 1 else ((1, 3), (5, length)),
        )
        for number, length in enumerate(lengths)
    )


def make_tuned(dropout: float = 0.0, **changes) -> Tuned:
    lora = LoraSpec(rank=4, alpha=8, dropout=dropout, targets=("q_proj", "v_proj"))
    return tune(make_model(**changes).requires_grad_(False), lora, 1, CHOICES)


def make_record(folder: Path, method: str = "lora") -> AdapterRecord:
    """What goes with weights that were trained on a model's folder."""
    return AdapterRecord(
        job="colours",
        digest="0123456789abcdef",
        base=f"file://{folder}",
        commit="c",
        method=method,
        quantization=QuantizationSpec(bits=16),
        dtype="float32",
        attention="sdpa",
        format="instruction",
    )


def make_test_loop(  # noqa: PLR0917 (all that a step depends on)
    tuned: Tuned,
    rows,
    micro_batch: int = 4,
    steps: int = 4,
    choices: Choices = CHOICES,
    world: World = ALONE,
    **training,
) -> Loop:
    settings = TrainingSpec(**{"global_batch_size": 8, "learning_rate": 0.01, "warmup_ratio": 0.0} | training)
    return make_loop(tuned, rows, Schedule(settings, micro_batch, steps), choices, world)


def weights_of(tuned: Tuned) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in tuned.parameters()]


def run_steps(loop: Loop) -> tuple[StepRecord, ...]:
    return tuple(loop.run(StopFlag(), DEAF).steps)
