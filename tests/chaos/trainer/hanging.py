"""A training process, one of two, of which one sleeps for ever inside a step."""

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


def sleep_for_ever(loop: TrainingLoop, step: int) -> StepRecord:
    """Take a step, unless it is the one that never ends."""
    while step == STEP and loop.world.rank == 1:
        time.sleep(3600)
    return original_step(loop, step)


def run_process(folder: Path) -> int:
    """Be a training pod's process."""
    words = {"config": folder / "run.json", "work": folder / f"work-{os.environ['RANK']}"}
    word = folder / "{rank}.json"
    with patch.object(TrainingLoop, "step", sleep_for_ever):
        return main(["train", *(f"--{name}={path}" for name, path in words.items()), f"--termination-message={word}"])


if __name__ == "__main__":
    sys.exit(run_process(Path(sys.argv[1])))
