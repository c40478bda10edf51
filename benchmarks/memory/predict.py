"""Predicts the memory of a combination with qlora_planner.memory.activations."""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.memory.combinations import Combination
from benchmarks.memory.models import EAGER, measured_step, micro_batches_of_step, model_config, token_rows
from qlora_planner.memory.activations import estimate_activations
from qlora_planner.memory.forward_config import FP32, HALF, BatchShape, ForwardConfig
from qlora_planner.models.families import read_shape
from qlora_planner.models.shapes import ModelShape
from qlora_trainer.data.tokenization import TokenRow


@dataclass(frozen=True)
class Predicted:
    """Predicted bytes, with the names of the measured ones."""

    kept: int
    peak: int
    step: int
    """Without gradients."""


def predict(combination: Combination) -> Predicted:
    """Return the predicted bytes."""
    shape = read_shape(model_config(combination))
    rows = token_rows(combination)
    one = estimate_activations(shape, forward_config_of(combination, shape, rows))
    micro_batches = [
        forward_config_of(combination, shape, group)
        for group in micro_batches_of_step(combination, measured_step(combination))
    ]
    return Predicted(one.saved, one.peak, max(estimate_activations(shape, each).peak for each in micro_batches))


def forward_config_of(combination: Combination, shape: ModelShape, rows: Sequence[TokenRow]) -> ForwardConfig:
    """Return the planner's forward configuration for some rows."""
    return ForwardConfig(
        batch=_batch_shape_of(rows, packing=combination.packing),
        device="cpu",
        attention="eager" if combination.family in EAGER else "sdpa",
        compute=FP32 if combination.dtype == "float32" else HALF,
        bits=combination.bits,
        ranks={} if combination.method == "full" else _ranks(combination, shape),
        dropout=combination.dropout > 0,
        dora=combination.dora,
        full_finetune=combination.method == "full",
        checkpointing=combination.checkpointing,
    )


def _ranks(combination: Combination, shape: ModelShape) -> dict[str, int]:
    all_linear = combination.targets == ("all-linear",)
    paths = [linear.path for linear in shape.decoder.linears]
    return {path: combination.rank for path in paths if all_linear or path.rpartition(".")[2] in combination.targets}


def _batch_shape_of(rows: Sequence[TokenRow], *, packing: bool) -> BatchShape:
    lengths = [len(row.input_ids) for row in rows]
    return BatchShape(
        rows=len(rows),
        longest=max(lengths),
        tokens=sum(lengths) if packing else len(rows) * max(lengths),
        labels=sum(row.label_count for row in rows),
        packing=packing,
        equal_length=len(set(lengths)) == 1,
    )
