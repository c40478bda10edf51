"""The training loop; randomness depends only on seed and step, so a resumed run matches an uninterrupted one."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from qlora_api.report import StepRecord, ValidationRecord
from qlora_api.steps import warmup_steps
from qlora_api.v1alpha1 import TrainingSpec
from qlora_trainer.data.batching import collate, pad_passes, sample_step, split_micro_batches
from qlora_trainer.data.tokenization import TokenRow
from qlora_trainer.distributed.world import World
from qlora_trainer.errors import interrupted_error
from qlora_trainer.evaluation.validation import Validator
from qlora_trainer.model.base_model import TrainableModel
from qlora_trainer.model.hardware import peak_memory_bytes
from qlora_trainer.model.neftune import noisy_embeddings
from qlora_trainer.model.runtime_settings import RuntimeSettings
from qlora_trainer.runtime.shutdown import StopFlag
from qlora_trainer.training.engine import Engine, make_engine
from qlora_trainer.training.health import (
    check_divergence,
    check_finite,
    check_gradients,
    check_skipped,
    check_trained,
)
from qlora_trainer.training.state import (
    History,
    TrainingState,
    Weights,
    best_validation,
    evaluation_is_due,
    is_finished,
)


@dataclass(frozen=True)
class Schedule:
    """Number of steps, micro-batch size and learning rates."""

    training: TrainingSpec
    micro_batch_size: int
    total_steps: int

    def learning_rate(self, step: int) -> float:
        """Return a step's learning rate: linear warm-up, then the scheduler's decay.

        Args:
            step: Counted from 0.

        """
        warmup = warmup_steps(self.training, self.total_steps)
        if step < warmup:
            return self.training.learning_rate * (step + 1) / warmup
        progress = (step - warmup) / max(self.total_steps - warmup, 1)
        decay = {"cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress, "constant": 1.0}
        return self.training.learning_rate * decay[self.training.scheduler]


@dataclass(frozen=True)
class TrainingCallbacks:
    """Callbacks of the training loop; every rank calls its own, and only the main process's report anything."""

    on_step: Callable[[StepRecord], None]
    """Called after each step."""
    on_validation: Callable[[ValidationRecord], None]
    """Called after each validation."""
    on_heartbeat: Callable[[], None]
    """Called after each batch of a validation."""
    should_checkpoint: Callable[[int, bool], bool]
    """Decides after a step whether to save a checkpoint, from the steps done and whether the loop ends here."""
    checkpoint: Callable[[TrainingState, bool], None]
    """Saves the state; when the loop ends here (second argument), the checkpoint is complete on return."""


@dataclass(frozen=True)
class TrainingLoop:
    """Model, rows and settings that every step uses."""

    trainable: TrainableModel
    rows: Sequence[TokenRow]
    schedule: Schedule
    settings: RuntimeSettings
    world: World
    engine: Engine
    held_out: Sequence[TokenRow] = ()

    def run(self, stop: StopFlag, callbacks: TrainingCallbacks, start: TrainingState | None = None) -> History:
        """Train the adapter in place.

        Args:
            stop: Raised by SIGTERM; the loop ends after the current step, with a checkpoint.
            callbacks: Reports, and checkpoint decisions.
            start: State to resume from; None starts from step 0.

        Returns:
            All steps and validations, including those before `start`. The model has the selected weights.

        Raises:
            RunError: INTERRUPTED after a stop; NON_FINITE_LOSS, LOSS_DIVERGED or TRAINER_ERROR if training failed.

        """
        training, total = self.schedule.training, self.schedule.total_steps
        history, best = (start.history.copy(), start.best) if start else (History(), {})
        self.engine.initialize(start)
        self.trainable.wrapped.train()
        with stop.deferred():
            while not is_finished(history, training, total):
                if evaluation_is_due(history, training, total):
                    self._evaluate(history, stop, callbacks)
                    best = self._update_best(history, best)
                else:
                    self._train_step(history, callbacks)
                if self._maybe_checkpoint(callbacks, history, best, stop):
                    raise interrupted_error(len(history.steps))
        check_trained(history)
        self.engine.load_weights(best)
        return history

    def _train_step(self, history: History, callbacks: TrainingCallbacks) -> None:
        """Train one step, and end the run if it diverged."""
        record = self.step(len(history.steps))
        check_finite(record, scaling=self.settings.dtype == torch.float16)
        callbacks.on_step(record)
        history.add_step(record)
        check_skipped(history)
        check_divergence(history)

    def _evaluate(self, history: History, stop: StopFlag, callbacks: TrainingCallbacks) -> None:
        """Run a validation; one that a stop interrupted is discarded."""
        validator = Validator(self.held_out, self.schedule.micro_batch_size, self.world, packing=self.settings.packing)
        record = validator.run(self.trainable, len(history.steps), stop, callbacks.on_heartbeat)
        if record is None:
            return
        callbacks.on_validation(record)
        history.add_validation(record)

    def _update_best(self, history: History, best: Weights) -> Weights:
        """Return the best weights after a validation."""
        records = history.validations
        improved = self.schedule.training.keep == "best" and records and records[-1] == best_validation(records)
        return self.engine.weights() if improved else best

    def _maybe_checkpoint(self, callbacks: TrainingCallbacks, history: History, best: Weights, stop: StopFlag) -> bool:
        """Save a checkpoint from the main process if one is due; return whether all ranks must stop."""
        training, total, step = self.schedule.training, self.schedule.total_steps, len(history.steps)
        (stopping,) = self.world.all_reduce_any(stop.requested)
        last = stopping or is_finished(history, training, total)
        # A validation that is due comes first: the checkpoint includes its record.
        ready = self.world.is_main_process and (stopping or not evaluation_is_due(history, training, total))
        (wanted,) = self.world.all_reduce_any(ready and callbacks.should_checkpoint(step, last))
        if wanted:
            state = self._snapshot_state(history, best)
            if self.world.is_main_process:
                callbacks.checkpoint(state, last)
        if stopping:
            self.world.barrier()  # the first rank to exit would take the saving one down with it
        return stopping

    def _snapshot_state(self, history: History, best: Weights) -> TrainingState:
        return TrainingState(
            history=history.copy(),
            weights=self.engine.weights(),
            optimizer=self.engine.optimizer_state(),
            scaler=self.engine.scaler_state(),
            best=best,
            peak_memory_bytes=peak_memory_bytes(self.trainable.device),
        )

    def step(self, step: int) -> StepRecord:
        """Train on one global batch.

        Args:
            step: Counted from 0; the record counts from 1.

        Returns:
            Mean loss per label in nats over all ranks, and the gradient norm before clipping.

        """
        started, training = time.perf_counter(), self.schedule.training
        # Dropout depends only on seed, step and rank, not on what drew random numbers before.
        torch.manual_seed((training.seed << 30) + step * self.world.size + self.world.rank)
        numbers = sample_step(step, len(self.rows), training.global_batch_size, training.seed)
        window = [self.rows[number] for number in numbers]
        # Divided by all labels of the step: a mean of micro-batch means overweights short rows (transformers#34191).
        labels = sum(row.label_count for row in window)
        loss = self.world.all_reduce_sum(self._accumulate(window, labels)) / labels
        if step == 0 and (self.world.backward_is_collective or self.world.shard(window)):
            check_gradients(self.engine.gradients())
        rate = self.schedule.learning_rate(step)
        norm = self.engine.optimizer_step(rate)
        return StepRecord(
            step=step + 1,
            loss=loss,
            learning_rate=rate,
            grad_norm=norm,
            tokens=sum(len(row.input_ids) for row in window),
            seconds=time.perf_counter() - started,
        )

    def _accumulate(self, window: Sequence[TokenRow], labels: int) -> float:
        """Accumulate the gradients of this rank's micro-batches, and return its summed loss."""
        total, passes = 0.0, self._passes(window)
        for number, (rows, counts) in enumerate(passes, start=1):
            total += self._backward(rows, 1 / labels if counts else 0.0, last=number == len(passes))
        return total

    def _backward(self, rows: Sequence[TokenRow], weight: float, *, last: bool) -> float:
        """Accumulate the gradients of one micro-batch, and return its summed loss."""
        batch = collate(rows, self.trainable.device, packing=self.settings.packing)
        with noisy_embeddings(self.trainable.model, self.schedule.training.neftune_alpha, batch):
            return self.engine.backward(batch, weight, last=last)

    def _passes(self, window: Sequence[TokenRow]) -> list[tuple[Sequence[TokenRow], bool]]:
        """Return this rank's micro-batches; if backward is collective, padded to the maximum number over all ranks."""
        ranks = range(self.world.size) if self.world.backward_is_collective else [self.world.rank]
        groups = {
            rank: split_micro_batches(
                self.world.shard(window, rank), self.schedule.micro_batch_size, packing=self.settings.packing
            )
            for rank in ranks
        }
        return pad_passes(groups[self.world.rank], max(map(len, groups.values())), window[0])


def make_loop(
    trainable: TrainableModel, rows: Sequence[TokenRow], schedule: Schedule, settings: RuntimeSettings, world: World
) -> TrainingLoop:
    """Return a training loop with fresh optimizer state.

    Raises:
        RunError: INVALID_SPEC if the strategy cannot compute in the device's dtype.

    """
    return TrainingLoop(
        trainable, rows, schedule, settings, world, make_engine(trainable, schedule.training, settings, world)
    )
