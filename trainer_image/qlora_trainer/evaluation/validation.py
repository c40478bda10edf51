"""The held-out rows while a training goes on: the same loss as in the evaluation, shared among the processes."""

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
    """Held-out rows, and who looks at them."""

    def __init__(self, rows: Sequence[TokenRow], micro_batch_size: int, world: World, *, packing: bool) -> None:
        self._micro_batch_size = micro_batch_size
        self._packing = packing
        self._world = world
        # Each row is in one process: with rows repeated to fill a last batch some would count twice (trap 27). Where
        # passes are made in step, shares of different lengths would wait for ever, so that each process takes all rows.
        self._shard = rows if world.forward_is_collective else [rows[place] for place in world.shard(range(len(rows)))]

    def run(
        self, trainable: TrainableModel, step: int, stop: StopFlag, on_heartbeat: Callable[[], None]
    ) -> ValidationRecord | None:
        """Return the loss after a step; None when the process was asked to stop meanwhile."""
        started = time.perf_counter()
        with trainable.evaluating():
            sums = self._local_sums(trainable, stop, on_heartbeat)
        # The sums are added up even when they are worthless: all processes must make the same calls.
        loss, correct, tokens = sums if self._world.forward_is_collective else map(self._world.all_reduce_sum, sums)
        if self._world.all_reduce_any(stop.requested)[0]:
            return None
        check_finite_loss(loss, step)
        seconds = time.perf_counter() - started
        return ValidationRecord(step=step, loss=loss / tokens, token_accuracy=correct / tokens, seconds=seconds)

    def _local_sums(
        self, trainable: TrainableModel, stop: StopFlag, on_heartbeat: Callable[[], None]
    ) -> tuple[float, float, float]:
        """Return the summed loss, the hits and the tokens of this process's rows."""
        loss, correct, tokens = 0.0, 0.0, 0.0
        for group in split_micro_batches(self._shard, self._micro_batch_size, packing=self._packing):
            if stop.requested and not self._world.forward_is_collective:
                break
            losses, hits = trainable.statistics(collate(group, trainable.device, packing=self._packing))
            loss, correct, tokens = loss + float(losses.sum()), correct + float(hits.sum()), tokens + len(losses)
            on_heartbeat()
        return loss, correct, tokens


def check_finite_loss(loss: float, step: int) -> None:
    """End a run whose adapter can no longer be measured."""
    if not math.isfinite(loss):
        raise RunError(
            Reason.NON_FINITE_LOSS,
            f"the loss on the held-out rows is {loss} after step {step}; lower spec.training.learningRate, or check "
            "the dataset",
            step,
        )
