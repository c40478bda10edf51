"""Validation during training: the same loss as the evaluation, with the rows sharded over the ranks."""

import math
import time
from collections.abc import Callable, Sequence

from qlora_api.reasons import Reason
from qlora_api.report import ValidationRecord
from qlora_trainer.data.batching import collate, split_micro_batches
from qlora_trainer.data.tokenization import TokenRow
from qlora_trainer.distributed.world import World
from qlora_trainer.errors import RunError
from qlora_trainer.model.base_model import TrainableModel
from qlora_trainer.runtime.shutdown import StopFlag


class Validator:
    """Computes the validation loss of the current weights."""

    def __init__(self, rows: Sequence[TokenRow], micro_batch_size: int, world: World, *, packing: bool) -> None:
        self._micro_batch_size = micro_batch_size
        self._packing = packing
        self._world = world
        # Each row is on one rank only: repeating rows to fill the last batch would count some twice (trap 27). If the
        # forward pass is collective, shards of unequal length would deadlock, so every rank processes all rows.
        self._shard = rows if world.forward_is_collective else [rows[index] for index in world.shard(range(len(rows)))]

    def run(
        self, trainable: TrainableModel, step: int, stop: StopFlag, on_heartbeat: Callable[[], None]
    ) -> ValidationRecord | None:
        """Return the validation record of a step; None if a stop was requested meanwhile."""
        started = time.perf_counter()
        with trainable.evaluating():
            sums = self._local_sums(trainable, stop, on_heartbeat)
        # All-reduced even after a stop, when the sums are incomplete: all ranks must make the same calls.
        loss, correct, tokens = sums if self._world.forward_is_collective else map(self._world.all_reduce_sum, sums)
        if self._world.all_reduce_any(stop.requested)[0]:
            return None
        check_finite_loss(loss, step)
        seconds = time.perf_counter() - started
        return ValidationRecord(step=step, loss=loss / tokens, token_accuracy=correct / tokens, seconds=seconds)

    def _local_sums(
        self, trainable: TrainableModel, stop: StopFlag, on_heartbeat: Callable[[], None]
    ) -> tuple[float, float, float]:
        """Return summed loss, correct labels and number of labels over this rank's rows."""
        loss, correct, tokens = 0.0, 0.0, 0.0
        for group in split_micro_batches(self._shard, self._micro_batch_size, packing=self._packing):
            if stop.requested and not self._world.forward_is_collective:
                break
            losses, hits = trainable.statistics(collate(group, trainable.device, packing=self._packing))
            loss, correct, tokens = loss + float(losses.sum()), correct + float(hits.sum()), tokens + len(losses)
            on_heartbeat()
        return loss, correct, tokens


def check_finite_loss(loss: float, step: int) -> None:
    """End the run if the validation loss is not finite."""
    if not math.isfinite(loss):
        raise RunError(
            Reason.NON_FINITE_LOSS,
            f"the loss on the held-out rows is {loss} after step {step}; lower spec.training.learningRate, or check "
            "the dataset",
            step,
        )
