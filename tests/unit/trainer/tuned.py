"""A tiny model with an adapter, rows of random tokens, and a loop over them."""

from pathlib import Path

import torch

from qlora_api.report import AdapterRecord, StepRecord
from qlora_api.v1alpha1 import LoraSpec, QuantizationSpec, TrainingSpec
from qlora_trainer.data.tokenization import TokenRow
from qlora_trainer.distributed.world import World
from qlora_trainer.model.base_model import TrainableModel, attach_lora
from qlora_trainer.model.optimizer import OptimizerKind
from qlora_trainer.model.runtime_settings import RuntimeSettings
from qlora_trainer.runtime.shutdown import StopFlag
from qlora_trainer.training.loop import Schedule, TrainingCallbacks, TrainingLoop, make_loop
from tests.unit.trainer.tiny import CPU, make_model

NO_CALLBACKS = TrainingCallbacks(lambda _: None, lambda _: None, lambda: None, lambda *_: False, lambda *_: None)
SETTINGS = RuntimeSettings(
    torch.float32, "sdpa", gradient_checkpointing=False, packing=True, optimizer=OptimizerKind.ADAMW, reasons={}
)
NF4 = QuantizationSpec(bits=4)
SINGLE_PROCESS = World(CPU)


def token_rows(count: int = 16, seed: int = 0, spans: int = 1) -> tuple[TokenRow, ...]:
    """Rows with labels from the end of the prompt on, or in two spans as in chats."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(6, 24, (count,), generator=generator).tolist()
    return tuple(
        TokenRow(
            tuple(torch.randint(2, 384, (length,), generator=generator).tolist()),
            ((2 + number % 4, length),) if spans == 1 else ((1, 3), (5, length)),
        )
        for number, length in enumerate(lengths)
    )


def make_trainable(dropout: float = 0.0, **changes) -> TrainableModel:
    lora = LoraSpec(rank=4, alpha=8, dropout=dropout, targets=("q_proj", "v_proj"))
    return attach_lora(make_model(**changes).requires_grad_(False), lora, 1, SETTINGS)


def make_record(folder: Path, method: str = "lora") -> AdapterRecord:
    """The record of weights that were trained on the model of a folder."""
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


def make_test_loop(  # noqa: PLR0917 (everything that a step depends on)
    trainable: TrainableModel,
    rows,
    micro_batch: int = 4,
    steps: int = 4,
    runtime_settings: RuntimeSettings = SETTINGS,
    world: World = SINGLE_PROCESS,
    **training,
) -> TrainingLoop:
    settings = TrainingSpec(**{"global_batch_size": 8, "learning_rate": 0.01, "warmup_ratio": 0.0} | training)
    return make_loop(trainable, rows, Schedule(settings, micro_batch, steps), runtime_settings, world)


def weights_of(trainable: TrainableModel) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainable.parameters()]


def run_steps(loop: TrainingLoop) -> tuple[StepRecord, ...]:
    return tuple(loop.run(StopFlag(), NO_CALLBACKS).steps)
