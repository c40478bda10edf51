"""What each of the two processes of test_two_processes.py does: train on its share, and write down the end."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file

from qlora_trainer.distributed.world import World, join_world, leave_world
from qlora_trainer.errors import RunError
from qlora_trainer.evaluation.evaluator import sum_rows
from qlora_trainer.runtime.shutdown import StopFlag
from qlora_trainer.stages import find_start
from qlora_trainer.training.checkpoint_store import Checkpoints, Course
from qlora_trainer.training.loop import Loop, Watcher
from tests.unit.trainer.training.test_checkpoint_store import make_checkpoints, make_keeper
from tests.unit.trainer.tuned import ALONE, DEAF, make_test_loop, make_tuned, token_rows

STEPS = 4
GLOBAL_BATCH = 16
STRATEGIES = ("ddp", "zero2", "zero3")


def make_shared_loop(micro_batch: int, world: World = ALONE) -> Loop:
    """A loop over 17 rows, so that every second step has one row for two processes, and a look after each of those."""
    training = {"global_batch_size": GLOBAL_BATCH, "evaluate_every": 2}
    loop = make_test_loop(make_tuned(), token_rows(17), micro_batch, STEPS, world=world, **training)
    return dataclasses.replace(loop, held_out=token_rows(7, seed=3))


def write_down(loop: Loop, losses: Sequence[float], name: str, folder: Path) -> None:
    """Write losses and the weights that this process sees."""
    weights = dict(loop.engine.weights())
    Path(folder, f"{name}-{loop.world.rank}.losses").write_text("\n".join(map(repr, losses)))
    save_file(weights, Path(folder, f"{name}-{loop.world.rank}.safetensors"))


def train_whole(world: World, folder: Path) -> None:
    """Train from beginning to end, and measure rows together afterwards."""
    loop = make_shared_loop(micro_batch=3, world=world)
    history = loop.run(StopFlag(), DEAF)
    with loop.tuned.evaluating():
        sums = world.spread(token_rows(5, seed=4), lambda rows: sum_rows(loop.tuned, rows, 2, packing=True))
    losses = [record.loss for record in history.steps] + [look.loss for look in history.held_out]
    write_down(loop, [*losses, *(row.loss for row in sums)], world.strategy, folder)


def checkpoints_of(world: World, folder: Path) -> Checkpoints:
    """Checkpoints that both processes see."""
    division = f"{world.strategy} x 2" if world.learns_in_step else ""
    course = Course(digest=f"{world.strategy:0<16}", total_steps=STEPS, rows=17, optimizer="adamw", division=division)
    return make_checkpoints(folder, course)[0]


def train_in_two_parts(world: World, folder: Path) -> None:
    """Train until one of the two is asked to stop, and go on in a new loop."""
    stop = StopFlag()

    def note(record) -> None:
        stop.requested = record.step == 2 and world.rank == 1

    keeper = make_keeper(checkpoints_of(world, folder))
    watcher = Watcher(note, lambda _: None, lambda: None, wants=keeper.wants, keep=keeper.keep)
    try:
        make_shared_loop(micro_batch=3, world=world).run(stop, watcher)
    except RunError as error:
        Path(folder, f"{world.strategy}-{world.rank}.stopped").write_text(str(error))
    resumed = make_shared_loop(micro_batch=3, world=world)
    start = find_start(checkpoints_of(world, folder), world)
    history = resumed.run(StopFlag(), DEAF, start)
    losses = [record.loss for record in history.steps] + [look.loss for look in history.held_out]
    write_down(resumed, losses, f"{world.strategy}-resumed", folder)


def main(folder: Path) -> None:
    """Do everything with each strategy in turn."""
    for strategy in STRATEGIES:
        world = join_world("cpu", strategy)
        train_whole(world, folder)
        train_in_two_parts(world, folder)
    leave_world()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
