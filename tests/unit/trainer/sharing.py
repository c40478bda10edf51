"""Run by each of two processes of test_distribution_matrix.py: trains two steps of every allowed combination."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Final

import torch

from qlora_codegen.distribution_matrix import MatrixCell, matrix_cells
from qlora_trainer.distributed.world import World, join_world, leave_world
from qlora_trainer.evaluation.evaluator import compute_row_statistics
from qlora_trainer.model.base_model import TrainableModel, attach_lora, load_base, prepare_full_finetune
from qlora_trainer.model.optimizer import choose_optimizer
from qlora_trainer.runtime.shutdown import StopFlag
from tests.unit.trainer.tiny import write_model
from tests.unit.trainer.tuned import NO_CALLBACKS, SETTINGS, make_test_loop, token_rows

STEPS: Final = 2


def key_of(cell: MatrixCell) -> str:
    return f"{cell.base} / {cell.variant} / {cell.strategy}"


def make_trainable(cell: MatrixCell, folder: Path) -> TrainableModel:
    """The tiny model of the cell's spec; in fp32, so that strategies do not differ by rounding."""
    spec = cell.spec
    kind, _ = choose_optimizer(spec.training.optimizer, "cpu")
    settings = dataclasses.replace(SETTINGS, optimizer=kind, packing=spec.training.packing)
    base = load_base(folder, spec.quantization, torch.float32, "sdpa", "cpu")
    if spec.method == "full":
        return prepare_full_finetune(base, settings)
    return attach_lora(base, spec.lora.model_copy(update={"rank": 4, "targets": ("all-linear",)}), 1, settings)


def train_cell(cell: MatrixCell, world: World, folder: Path) -> list[float]:
    """Loss of each step, and losses of held-out rows after training."""
    training = cell.spec.training
    kind, _ = choose_optimizer(training.optimizer, "cpu")
    settings = dataclasses.replace(SETTINGS, optimizer=kind, packing=training.packing)
    trainable = make_trainable(cell, folder)
    noise = {"neftune_alpha": training.neftune_alpha}
    loop = make_test_loop(trainable, token_rows(8), 2, STEPS, settings, world=world, **noise)
    history = loop.run(StopFlag(), NO_CALLBACKS)
    with trainable.evaluating():
        sums = world.map_sharded(
            token_rows(3, seed=5), lambda rows: compute_row_statistics(trainable, rows, 2, packing=training.packing)
        )
    assert loop.engine.weights()
    return [*(record.loss for record in history.steps), *(row.loss for row in sums)]


def main(folder: Path) -> None:
    """Write the losses of each allowed cell."""
    world = join_world("cpu", "ddp")
    if world.is_main_process:
        write_model(folder / "model", tie_word_embeddings=False)
    world.barrier()
    allowed = [cell for cell in matrix_cells() if cell.rejection is None]
    found = {key_of(cell): train_cell(cell, join_world("cpu", cell.strategy), folder / "model") for cell in allowed}
    if world.is_main_process:
        (folder / "found.json").write_text(json.dumps(found))
    leave_world()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
