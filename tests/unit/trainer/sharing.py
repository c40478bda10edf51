"""What each of two processes does for test_sharing.py: train two steps in every way that several may share."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Final

import torch

from qlora_codegen.distribution_matrix import Cell, cells
from qlora_trainer.distributed.world import World, join_world, leave_world
from qlora_trainer.evaluation.evaluator import sum_rows
from qlora_trainer.model.base_model import Tuned, load_base, tune, tune_whole
from qlora_trainer.model.optimizer import choose_optimizer
from qlora_trainer.runtime.shutdown import StopFlag
from tests.unit.trainer.tiny import write_model
from tests.unit.trainer.tuned import CHOICES, DEAF, make_test_loop, token_rows

STEPS: Final = 2


def key_of(cell: Cell) -> str:
    return f"{cell.base} / {cell.way} / {cell.strategy}"


def make_tuned(cell: Cell, folder: Path) -> Tuned:
    """The tiny model as the cell's spec wants it; in fp32, so that only the ways differ and not their rounding."""
    spec = cell.spec
    kind, _ = choose_optimizer(spec.training.optimizer, "cpu")
    choices = dataclasses.replace(CHOICES, optimizer=kind, packing=spec.training.packing)
    base = load_base(folder, spec.quantization, torch.float32, "sdpa", "cpu")
    if spec.method == "full":
        return tune_whole(base, choices)
    return tune(base, spec.lora.model_copy(update={"rank": 4, "targets": ("all-linear",)}), 1, choices)


def learn(cell: Cell, world: World, folder: Path) -> list[float]:
    """Losses of each step, and of held-out rows afterwards."""
    training = cell.spec.training
    kind, _ = choose_optimizer(training.optimizer, "cpu")
    choices = dataclasses.replace(CHOICES, optimizer=kind, packing=training.packing)
    tuned = make_tuned(cell, folder)
    noise = {"neftune_alpha": training.neftune_alpha}
    loop = make_test_loop(tuned, token_rows(8), 2, STEPS, choices, world=world, **noise)
    history = loop.run(StopFlag(), DEAF)
    with tuned.evaluating():
        sums = world.spread(token_rows(3, seed=5), lambda rows: sum_rows(tuned, rows, 2, packing=training.packing))
    assert loop.engine.weights()
    return [*(record.loss for record in history.steps), *(row.loss for row in sums)]


def main(folder: Path) -> None:
    """Write what each allowed cell learned."""
    world = join_world("cpu", "ddp")
    if world.leads:
        write_model(folder / "model", tie_word_embeddings=False)
    world.wait()
    allowed = [cell for cell in cells() if cell.refusal is None]
    found = {key_of(cell): learn(cell, join_world("cpu", cell.strategy), folder / "model") for cell in allowed}
    if world.leads:
        (folder / "found.json").write_text(json.dumps(found))
    leave_world()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
