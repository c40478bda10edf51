"""What each of the two processes of test_two_processes.py does: train on its shard, and write the results."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file

from qlora_trainer.distributed.world import World, join_world, leave_world
from qlora_trainer.errors import RunError
from qlora_trainer.evaluation.evaluator import compute_row_statistics
from qlora_trainer.runtime.shutdown import StopFlag
from qlora_trainer.stages import find_resume_state
from qlora_trainer.training.checkpoint_store import CheckpointStore, RunFingerprint
from qlora_trainer.training.loop import TrainingLoop
from tests.unit.trainer.training.test_checkpoint_store import make_callbacks, make_checkpointer, make_checkpoints
from tests.unit.trainer.tuned import NO_CALLBACKS, SINGLE_PROCESS, make_test_loop, make_trainable, token_rows

STEPS = 4
GLOBAL_BATCH = 16
STRATEGIES = ("ddp", "zero2", "zero3")


def make_shared_loop(micro_batch: int, world: World = SINGLE_PROCESS) -> TrainingLoop:
    """A loop over 17 rows: every second step has one row for two processes, and is followed by a validation."""
    training = {"global_batch_size": GLOBAL_BATCH, "evaluate_every": 2}
    loop = make_test_loop(make_trainable(), token_rows(17), micro_batch, STEPS, world=world, **training)
    return dataclasses.replace(loop, held_out=token_rows(7, seed=3))


def write_results(loop: TrainingLoop, losses: Sequence[float], name: str, folder: Path) -> None:
    """Write this rank's losses and weights."""
    weights = dict(loop.engine.weights())
    Path(folder, f"{name}-{loop.world.rank}.losses").write_text("\n".join(map(repr, losses)))
    save_file(weights, Path(folder, f"{name}-{loop.world.rank}.safetensors"))


def train_uninterrupted(world: World, folder: Path) -> None:
    """Train all steps, then evaluate rows on both ranks."""
    loop = make_shared_loop(micro_batch=3, world=world)
    history = loop.run(StopFlag(), NO_CALLBACKS)
    with loop.trainable.evaluating():
        sums = world.map_sharded(
            token_rows(5, seed=4), lambda rows: compute_row_statistics(loop.trainable, rows, 2, packing=True)
        )
    losses = [record.loss for record in history.steps] + [validation.loss for validation in history.validations]
    write_results(loop, [*losses, *(row.loss for row in sums)], world.strategy, folder)
    if world.backward_is_collective:
        state = loop.engine.optimizer_state()
        Path(folder, f"{world.strategy}-{world.rank}.state").write_text(" ".join(sorted({name[:2] for name in state})))


def checkpoints_of(world: World, folder: Path) -> CheckpointStore:
    """Checkpoints that both ranks share."""
    division = f"{world.strategy} x 2" if world.backward_is_collective else ""
    fingerprint = RunFingerprint(
        digest=f"{world.strategy:0<16}", total_steps=STEPS, rows=17, optimizer="adamw", division=division
    )
    return make_checkpoints(folder, fingerprint)[0]


def train_in_two_parts(world: World, folder: Path) -> None:
    """Train until one rank gets a stop request, and resume in a new loop."""
    stop = StopFlag()

    def request_stop(record) -> None:
        stop.requested = record.step == 2 and world.rank == 1

    callbacks = make_callbacks(make_checkpointer(checkpoints_of(world, folder)), on_step=request_stop)
    try:
        make_shared_loop(micro_batch=3, world=world).run(stop, callbacks)
    except RunError as error:
        Path(folder, f"{world.strategy}-{world.rank}.stopped").write_text(str(error))
    resumed = make_shared_loop(micro_batch=3, world=world)
    start = find_resume_state(checkpoints_of(world, folder), world)
    history = resumed.run(StopFlag(), NO_CALLBACKS, start)
    losses = [record.loss for record in history.steps] + [validation.loss for validation in history.validations]
    write_results(resumed, losses, f"{world.strategy}-resumed", folder)


def main(folder: Path) -> None:
    """Run both with each strategy."""
    for strategy in STRATEGIES:
        world = join_world("cpu", strategy)
        train_uninterrupted(world, folder)
        train_in_two_parts(world, folder)
    leave_world()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
