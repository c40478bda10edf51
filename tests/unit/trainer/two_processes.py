"""What each of the two processes of test_two_processes.py does: train on its share, and write down the end."""

import dataclasses
import sys
from pathlib import Path

from safetensors.torch import save_file

from qlora_trainer.distributed import join_world
from qlora_trainer.interrupt import StopFlag
from qlora_trainer.train import Loop
from tests.unit.trainer.tuned import DEAF, make_test_loop, make_tuned, token_rows

STEPS = 4
GLOBAL_BATCH = 16


def make_shared_loop(micro_batch: int) -> Loop:
    """A loop over 17 rows, so that every second step has one row for two processes, and a look after each of those."""
    training = {"global_batch_size": GLOBAL_BATCH, "evaluate_every": 2}
    loop = make_test_loop(make_tuned(), token_rows(17), micro_batch, STEPS, **training)
    return dataclasses.replace(loop, held_out=token_rows(7, seed=3))


def main(folder: Path) -> None:
    """Train, write down losses and weights, and let one process ask both to stop."""
    world, stop = join_world("cpu"), StopFlag()
    loop = dataclasses.replace(make_shared_loop(micro_batch=8), world=world)
    history = loop.run(stop, DEAF)
    losses = [*(record.loss for record in history.steps), *(look.loss for look in history.held_out)]
    Path(folder, f"losses-{world.rank}").write_text("\n".join(map(repr, losses)))
    names = [name for name, weight in loop.tuned.peft.named_parameters() if weight.requires_grad]
    save_file(
        {name: weight.detach() for name, weight in zip(names, loop.tuned.parameters(), strict=True)},
        Path(folder, f"weights-{world.rank}.safetensors"),
    )
    stop.requested = world.rank == 1
    Path(folder, f"stopped-{world.rank}").write_text(str(world.any(stop.requested)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
