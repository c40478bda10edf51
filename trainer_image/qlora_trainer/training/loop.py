"""The training loop: reads top to bottom, and a step is a function of the seed and its number."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from qlora_api.reasons import Reason
from qlora_api.report import StepRecord, ValidationRecord
from qlora_api.steps import warmup_steps
from qlora_api.v1alpha1 import TrainingSpec
from qlora_trainer.data.batching import collate, pad_passes, sample_step, split_micro_batches
from qlora_trainer.data.tokenization import TokenRow
from qlora_trainer.distributed.world import World
from qlora_trainer.errors import RunError
from qlora_trainer.evaluation.validation import Validator
from qlora_trainer.model.base_model import TrainableModel
from qlora_trainer.model.hardware import peak_memory_bytes
from qlora_trainer.model.neftune import noisy_embeddings
from qlora_trainer.model.runtime_settings import RuntimeSettings
from qlora_trainer.runtime.shutdown import StopFlag, interrupted_error
from qlora_trainer.training.engine import Engine, make_engine
from qlora_trainer.training.state import (
    DIVERGED_RISE,
    DIVERGED_STEPS,
    History,
    TrainingState,
    Weights,
    best_validation,
    evaluation_is_due,
    is_finished,
)


@dataclass(frozen=True)
class Schedule:
    """How long, and in which portions."""

    training: TrainingSpec
    micro_batch_size: int
    total_steps: int

    def learning_rate(self, step: int) -> float:
        """Return the rate of a step, counted from 0: up in a line, then down along the chosen course."""
        warmup = warmup_steps(self.training, self.total_steps)
        if step < warmup:
            return self.training.learning_rate * (step + 1) / warmup
        passed = (step - warmup) / max(self.total_steps - warmup, 1)
        course = {"cosine": (1 + math.cos(math.pi * passed)) / 2, "linear": 1 - passed, "constant": 1.0}
        return self.training.learning_rate * course[self.training.scheduler]


@dataclass(frozen=True)
class TrainingCallbacks:
    """Who is told about a training while it goes on; every process tells its own, and only one's passes it on."""

    on_step: Callable[[StepRecord], None]
    """Called with each finished step."""
    on_validation: Callable[[ValidationRecord], None]
    """Called with each look at the held-out rows."""
    on_heartbeat: Callable[[], None]
    """Called now and then while that takes its time."""
    should_checkpoint: Callable[[int, bool], bool]
    """Asked with the steps done whether to keep the state after them, and told whether this is the last occasion."""
    checkpoint: Callable[[TrainingState, bool], None]
    """Called with the state to keep, and whether this is the last occasion: then it is kept when the call returns."""


@dataclass(frozen=True)
class TrainingLoop:
    """What every step of a run shares."""

    trainable: TrainableModel
    rows: Sequence[TokenRow]
    schedule: Schedule
    settings: RuntimeSettings
    world: World
    engine: Engine
    held_out: Sequence[TokenRow] = ()

    def run(self, stop: StopFlag, callbacks: TrainingCallbacks, start: TrainingState | None = None) -> History:
        """Train the adapter in place, on from a state if there is one, and return what happened."""
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
        self.engine.load_weights(best)
        return history

    def _train_step(self, history: History, callbacks: TrainingCallbacks) -> None:
        """Take a step, and refuse to go on when there is no point in it."""
        record = self.step(len(history.steps))
        check_finite(record, scaling=self.settings.dtype == torch.float16)
        callbacks.on_step(record)
        history.add_step(record)
        check_divergence(history)

    def _evaluate(self, history: History, stop: StopFlag, callbacks: TrainingCallbacks) -> None:
        """Look at the held-out rows; a look that a stop cut short is as if it had not been."""
        rows = Validator(self.held_out, self.schedule.micro_batch_size, self.world, packing=self.settings.packing)
        look = rows.run(self.trainable, len(history.steps), stop, callbacks.on_heartbeat)
        if look is None:
            return
        callbacks.on_validation(look)
        history.add_validation(look)

    def _update_best(self, history: History, best: Weights) -> Weights:
        """Return the weights to keep, after a look."""
        looks = history.validations
        is_news = self.schedule.training.keep == "best" and looks and looks[-1] == best_validation(looks)
        return self.engine.weights() if is_news else best

    def _maybe_checkpoint(self, callbacks: TrainingCallbacks, history: History, best: Weights, stop: StopFlag) -> bool:
        """Let one process keep the state, and return whether all of them have to stop."""
        training, total, step = self.schedule.training, self.schedule.total_steps, len(history.steps)
        (stopping,) = self.world.all_reduce_any(stop.requested)
        last = stopping or is_finished(history, training, total)
        # A look that is due belongs to the state after its step.
        ready = self.world.is_main_process and (stopping or not evaluation_is_due(history, training, total))
        (wanted,) = self.world.all_reduce_any(ready and callbacks.should_checkpoint(step, last))
        if wanted:
            state = self._snapshot_state(history, best)
            if self.world.is_main_process:
                callbacks.checkpoint(state, last)
        if stopping:
            self.world.barrier()  # who ends first would take the saving process with it
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
        """Learn from one global batch; steps count from 0 here, and from 1 in the record."""
        started, training = time.perf_counter(), self.schedule.training
        # Dropout depends on seed, step and rank alone, so that whatever drew random numbers before does not matter.
        torch.manual_seed((training.seed << 30) + step * self.world.size + self.world.rank)
        numbers = sample_step(step, len(self.rows), training.global_batch_size, training.seed)
        window = [self.rows[number] for number in numbers]
        # One divisor for the whole step: a mean of micro-batches' means weighs short rows more (transformers#34191).
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
        """Add up the gradients of this process's micro-batches, and return its summed loss."""
        total, passes = 0.0, self._passes(window)
        for number, (rows, counts) in enumerate(passes, start=1):
            total += self._backward(rows, 1 / labels if counts else 0.0, last=number == len(passes))
        return total

    def _backward(self, rows: Sequence[TokenRow], weight: float, *, last: bool) -> float:
        """Add the gradients of one micro-batch, and return its summed loss."""
        batch = collate(rows, self.trainable.device, packing=self.settings.packing)
        with noisy_embeddings(self.trainable.model, self.schedule.training.neftune_alpha, batch):
            return self.engine.backward(batch, weight, last=last)

    def _passes(self, window: Sequence[TokenRow]) -> list[tuple[Sequence[TokenRow], bool]]:
        """Return this process's passes over its share; where they are made in step, as many as any process has."""
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
    """Return a loop with fresh optimizer state."""
    return TrainingLoop(
        trainable, rows, schedule, settings, world, make_engine(trainable, schedule.training, settings, world)
    )


def check_gradients(gradients: Mapping[str, torch.Tensor | None]) -> None:
    """Refuse to go on when a part of the adapter gets no gradient: it would never learn, and nothing would say so."""
    # B starts at zero, so that in the first step A's gradient is zero and only B's can tell.
    idle = [
        name for name, gradient in gradients.items() if gradient is None or ("lora_B" in name and not gradient.any())
    ]
    if idle:
        what = f"no gradient reaches {len(idle)} weights of the adapter, such as {idle[0]}"
        raise RunError(Reason.TRAINER_ERROR, what, step=1)


def check_finite(record: StepRecord, *, scaling: bool) -> None:
    """End a run that diverged; while fp16 scaling looks for its scale, infinite gradients are no alarm."""
    if math.isfinite(record.loss) and (scaling or math.isfinite(record.grad_norm)):
        return
    what = f"loss {record.loss}" if not math.isfinite(record.loss) else f"gradient norm {record.grad_norm}"
    raise RunError(
        Reason.NON_FINITE_LOSS,
        f"step {record.step} has {what} at learning rate {record.learning_rate:.2e}; lower "
        "spec.training.learningRate, or check the dataset",
        record.step,
    )


def check_divergence(history: History) -> None:
    """End a run whose loss left its level for good: what follows would cost time and help nobody."""
    level = history.level_before_divergence()
    if level is not None:
        last = history.steps[-1]
        raise RunError(
            Reason.LOSS_DIVERGED,
            f"the loss was {level:.3f} and has been more than {DIVERGED_RISE} above that for {DIVERGED_STEPS} steps; "
            f"it is {last.loss:.3f} at step {last.step}; lower spec.training.learningRate, or raise warmupRatio",
            last.step,
        )
