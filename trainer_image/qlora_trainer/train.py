"""The training loop: reads top to bottom, and a step is a function of the seed and its number."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from qlora_api.names import Reason
from qlora_api.report import HeldOutRecord, StepRecord
from qlora_api.steps import warmup_steps
from qlora_api.v1alpha1 import TrainingSpec
from qlora_trainer.batches import make_batch, micro_batches, rows_of_step
from qlora_trainer.choices import Choices
from qlora_trainer.distributed import World
from qlora_trainer.errors import RunError
from qlora_trainer.hardware import peak_memory_bytes
from qlora_trainer.held_out import HeldOut
from qlora_trainer.history import (
    DIVERGED_RISE,
    DIVERGED_STEPS,
    History,
    best_of,
    evaluation_is_due,
    is_finished,
)
from qlora_trainer.interrupt import StopFlag, interrupted
from qlora_trainer.model import Tuned
from qlora_trainer.neftune import noisy_embeddings
from qlora_trainer.optimizer import make_optimizer
from qlora_trainer.state import TrainingState, Weights, copy_optimizer, copy_weights, put_optimizer, put_weights
from qlora_trainer.tokens import TokenRow


@dataclass(frozen=True)
class Schedule:
    """How long, and in which portions."""

    training: TrainingSpec
    micro_batch: int
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
class Watcher:
    """Who is told about a training while it goes on; one process speaks for all."""

    step: Callable[[StepRecord], None]
    """Called with each finished step."""
    held_out: Callable[[HeldOutRecord], None]
    """Called with each look at the held-out rows."""
    alive: Callable[[], None]
    """Called now and then while that takes its time."""
    offer: Callable[[int, Callable[[], TrainingState], bool], None]
    """Called with the steps done, what captures the state after them, and whether this is the last occasion."""


@dataclass(frozen=True)
class Loop:
    """What every step of a run shares."""

    tuned: Tuned
    rows: Sequence[TokenRow]
    schedule: Schedule
    choices: Choices
    world: World
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    held_out: Sequence[TokenRow] = ()

    def run(self, stop: StopFlag, watcher: Watcher, start: TrainingState | None = None) -> History:
        """Train the adapter in place, on from a state if there is one, and return what happened."""
        training, total = self.schedule.training, self.schedule.total_steps
        history, best = self._restore(start) if start else (History(), {})
        self.tuned.peft.train()
        with stop.deferred():
            while not is_finished(history, training, total):
                if evaluation_is_due(history, training, total):
                    self._look(history, stop, watcher)
                    best = self._best(history, best)
                else:
                    self._advance(history, watcher)
                stopping = self.world.any(stop.requested)
                self._offer(watcher, history, best, last=stopping)
                if stopping:
                    raise interrupted(len(history.steps))
        put_weights(self.tuned, best)
        return history

    def _advance(self, history: History, watcher: Watcher) -> None:
        """Take a step, and refuse to go on when there is no point in it."""
        record = self.step(len(history.steps))
        check_finite(record, scaling=self.scaler.is_enabled())
        if self.world.rank == 0:
            watcher.step(record)
        history.add_step(record)
        check_level(history)

    def _look(self, history: History, stop: StopFlag, watcher: Watcher) -> None:
        """Look at the held-out rows; a look that a stop cut short is as if it had not been."""
        rows = HeldOut(self.held_out, self.schedule.micro_batch, self.world, packing=self.choices.packing)
        look = rows.look(self.tuned, len(history.steps), stop, watcher.alive)
        if look is None:
            return
        if self.world.rank == 0:
            watcher.held_out(look)
        history.add_look(look)

    def _best(self, history: History, best: Weights) -> Weights:
        """Return the weights to keep, after a look."""
        looks = history.held_out
        is_news = self.schedule.training.keep == "best" and looks and looks[-1] == best_of(looks)
        return copy_weights(self.tuned) if is_news else best

    def _restore(self, state: TrainingState) -> tuple[History, Weights]:
        put_weights(self.tuned, state.weights)
        put_optimizer(self.optimizer, state.optimizer)
        if state.scaler:
            self.scaler.load_state_dict(dict(state.scaler))
        return state.history.copy(), state.best

    def _offer(self, watcher: Watcher, history: History, best: Weights, *, last: bool) -> None:
        """Let one process keep the state, which is the same in all of them."""
        training, total = self.schedule.training, self.schedule.total_steps
        # A look that is due belongs to the state after its step.
        if self.world.rank == 0 and (last or not evaluation_is_due(history, training, total)):
            last = last or is_finished(history, training, total)
            watcher.offer(len(history.steps), lambda: self._capture(history, best), last)

    def _capture(self, history: History, best: Weights) -> TrainingState:
        return TrainingState(
            history=history.copy(),
            weights=copy_weights(self.tuned),
            optimizer=copy_optimizer(self.optimizer),
            scaler=self.scaler.state_dict(),
            best=best,
            peak_memory_bytes=peak_memory_bytes(self.tuned.device),
        )

    def step(self, step: int) -> StepRecord:
        """Learn from one global batch; steps count from 0 here, and from 1 in the record."""
        started, training = time.perf_counter(), self.schedule.training
        # Dropout depends on seed, step and rank alone, so that whatever drew random numbers before does not matter.
        torch.manual_seed((training.seed << 30) + step * self.world.size + self.world.rank)
        numbers = rows_of_step(step, len(self.rows), training.global_batch_size, training.seed)
        window = [self.rows[number] for number in numbers]
        # One divisor for the whole step: a mean of micro-batches' means weighs short rows more (transformers#34191).
        labels = sum(row.label_count for row in window)
        mine = [window[place] for place in self.world.share(range(len(window)))]
        loss = self.world.total_of(self._accumulate(mine, labels)) / labels
        if step == 0 and mine:
            check_gradients(self.tuned)
        rate = self.schedule.learning_rate(step)
        norm = self._update(rate, training.max_grad_norm)
        return StepRecord(
            step=step + 1,
            loss=loss,
            learning_rate=rate,
            grad_norm=norm,
            tokens=sum(len(row.input_ids) for row in window),
            seconds=time.perf_counter() - started,
        )

    def _accumulate(self, rows: Sequence[TokenRow], labels: int) -> float:
        """Add up the gradients of this process's micro-batches, and return its summed loss."""
        # With fp16's scale from the start: small gradients of the logits would be lost before a later one.
        weight = self.scaler.scale(torch.ones((), device=self.tuned.device)) / labels
        groups = micro_batches(rows, self.schedule.micro_batch, packing=self.choices.packing)
        return sum((self._learn(group, weight) for group in groups), 0.0)

    def _learn(self, rows: Sequence[TokenRow], weight: torch.Tensor) -> float:
        """Add the gradients of one micro-batch, and return its summed loss.

        The graph goes with this call. While a variable holds it, checkpoints hold their inputs and bitsandbytes' 8-bit
        layers all of theirs, beside those of the next micro-batch.
        """
        batch = make_batch(rows, self.tuned.device, packing=self.choices.packing)
        with noisy_embeddings(self.tuned.causal, self.schedule.training.neftune_alpha, batch):
            loss = self.tuned.loss_sum(batch, weight)
        torch.autograd.backward(loss)
        return float(loss.detach() / weight)

    def _update(self, rate: float, max_norm: float) -> float:
        """Clip, step and clear; return the norm before clipping."""
        parameters = self.tuned.parameters()
        self.world.sum_gradients(parameters)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.scaler.unscale_(self.optimizer)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, max_norm))
        if math.isfinite(norm):
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm


def make_loop(tuned: Tuned, rows: Sequence[TokenRow], schedule: Schedule, choices: Choices, world: World) -> Loop:
    """Return a loop with fresh optimizer state."""
    optimizer = make_optimizer(tuned.parameters(), schedule.training, choices.optimizer)
    # Only fp16 needs its loss scaled; elsewhere the scaler passes everything through.
    scaler = torch.amp.GradScaler(tuned.device.type, enabled=choices.dtype == torch.float16)
    return Loop(tuned, rows, schedule, choices, world, optimizer, scaler)


def check_gradients(tuned: Tuned) -> None:
    """Refuse to go on when a part of the adapter gets no gradient: it would never learn, and nothing would say so."""
    weights = [(name, parameter.grad) for name, parameter in tuned.peft.named_parameters() if parameter.requires_grad]
    missing = [name for name, gradient in weights if gradient is None]
    # B starts at zero, so that in the first step A's gradient is zero and only B's can tell.
    idle = [name for name, gradient in weights if "lora_B" in name and gradient is not None and not gradient.any()]
    if missing or idle:
        raise RunError(
            Reason.TRAINER_ERROR,
            f"no gradient reaches {len(missing + idle)} weights of the adapter, such as {(missing + idle)[0]}",
            step=1,
        )


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


def check_level(history: History) -> None:
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
