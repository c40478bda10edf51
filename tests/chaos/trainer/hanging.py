"""A training process of two; rank 1 sleeps forever inside a step."""

import os
import sys
import time
from pathlib import Path
from unittest.mock import patch

from qlora_api.report import StepRecord
from qlora_trainer.__main__ import main
from qlora_trainer.training.loop import TrainingLoop

STEP = 2
original_step = TrainingLoop.step


def step_or_hang(loop: TrainingLoop, step: int) -> StepRecord:
    """Run a step, or hang in it."""
    while step == STEP and loop.world.rank == 1:
        time.sleep(3600)
    return original_step(loop, step)


def run_process(folder: Path) -> int:
    """Run the process of a training pod."""
    work = folder / f"work-{os.environ['RANK']}"
    paths = {"config": folder / "run.json", "work": work, "termination-message": folder / "{rank}.json"}
    options = [f"--{name}={path}" for name, path in paths.items()]
    with patch.object(TrainingLoop, "step", step_or_hang):
        return main(["train", *options])


if __name__ == "__main__":
    sys.exit(run_process(Path(sys.argv[1])))
