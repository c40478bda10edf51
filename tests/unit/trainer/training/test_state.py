"""Decisions from the history: validation, early stopping, the best weights, divergence."""

import dataclasses
import math
import random
from itertools import pairwise
from statistics import median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_api.reasons import Reason
from qlora_api.report import StepRecord, ValidationRecord
from qlora_api.v1alpha1 import EarlyStoppingSpec, TrainingSpec
from qlora_trainer.errors import RunError
from qlora_trainer.runtime.shutdown import StopFlag
from qlora_trainer.training.health import check_divergence
from qlora_trainer.training.state import (
    DIVERGED_RISE,
    DIVERGED_STEPS,
    History,
    best_validation,
    evaluation_is_due,
    patience_is_exhausted,
    selected_step,
)
from tests.unit.trainer.tuned import NO_CALLBACKS, make_test_loop, make_trainable, token_rows, weights_of


def steps_of(*losses: float) -> tuple[StepRecord, ...]:
    return tuple(
        StepRecord(step=number, loss=loss, learning_rate=0.1, grad_norm=1.0, tokens=1, seconds=1.0)
        for number, loss in enumerate(losses, start=1)
    )


def validations_of(*losses: float, every: int = 2) -> tuple[ValidationRecord, ...]:
    return tuple(
        ValidationRecord(step=number * every, loss=loss, token_accuracy=0.5, seconds=1.0)
        for number, loss in enumerate(losses, start=1)
    )


@pytest.mark.parametrize(
    ("done", "validations", "keep", "due"),
    [
        (0, 0, "last", False),
        (1, 0, "last", False),
        (2, 0, "last", True),
        (2, 1, "last", False),
        (5, 2, "last", False),
        (5, 2, "best", True),
    ],
)
def test_evaluation_is_due_at_each_multiple_and_at_the_end_with_keep_best(done, validations, keep, due):
    training = TrainingSpec(evaluate_every=2, keep=keep)
    history = History(steps_of(*[1.0] * done), validations_of(*[1.0] * validations))
    assert evaluation_is_due(history, training, total_steps=5) is due
    assert not evaluation_is_due(history, TrainingSpec(), total_steps=5)


@pytest.mark.parametrize(
    ("losses", "patience", "min_delta", "exhausted"),
    [
        ((), 1, 0.0, False),
        ((3.0, 2.0, 1.0), 1, 0.0, False),
        ((3.0, 2.0, 2.0), 1, 0.0, True),
        ((3.0, 2.0, 2.5, 1.9), 2, 0.0, False),
        ((3.0, 2.0, 2.5, 2.1), 2, 0.0, True),
        ((3.0, 2.95, 2.91), 2, 0.1, True),
        ((3.0, 2.95, 2.89), 2, 0.1, False),
    ],
)
def test_patience_is_exhausted_after_validations_without_improvement(losses, patience, min_delta, exhausted):
    assert (
        patience_is_exhausted(validations_of(*losses), EarlyStoppingSpec(patience=patience, min_delta=min_delta))
        is exhausted
    )


def test_best_validation_is_the_earliest_with_the_lowest_loss():
    assert best_validation(validations_of(3.0, 1.0, 2.0, 1.0)).step == 4
    assert best_validation(()) is None
    history = History(steps_of(1.0, 1.0, 1.0, 1.0, 1.0), validations_of(1.0, 2.0))
    assert selected_step(history, TrainingSpec(evaluate_every=2, keep="best")) == 2
    assert selected_step(history, TrainingSpec(evaluate_every=2)) == 5


@pytest.mark.parametrize(
    ("losses", "level"),
    [
        pytest.param([2.0] * 40 + [9.0] * 20, 2.0, id="rises-and-stays"),
        pytest.param([2.0] * 40 + [9.0] * 19, None, id="one-step-too-few"),
        pytest.param([2.0] * 40 + [9.0] * 19 + [3.0] + [9.0] * 19, None, id="recovers"),
        pytest.param([6.0] * 20 + [1.0] * 20 + [3.0] * 20, 1.0, id="above-its-lowest-level"),
        pytest.param([2.0] * 40 + [3.4] * 60, None, id="not-far-enough"),
        pytest.param([9.0] * 100, None, id="never-low"),
        pytest.param([], None, id="empty"),
    ],
)
def test_level_before_divergence(losses, level):
    assert History(steps_of(*losses)).level_before_divergence() == level


def test_noise_of_one_nat_is_no_divergence():
    chance, history = random.Random(0), History()
    for record in steps_of(*(1.0 + 3.0 * 0.99**step + chance.gauss(0.0, 1.0) for step in range(3000))):
        history.add_step(record)
        assert history.level_before_divergence() is None


def level_by_definition(losses: list[float]) -> float | None:
    """The same, computed from all losses at once."""
    recent, before = losses[-DIVERGED_STEPS:], losses[:-DIVERGED_STEPS]
    blocks = pairwise(range(0, len(before) + 1, DIVERGED_STEPS))
    level = min((median(before[start:end]) for start, end in blocks), default=math.inf)
    return level if min(recent, default=-math.inf) > level + DIVERGED_RISE else None


LEVELS = st.lists(st.tuples(st.floats(0, 12), st.integers(1, 70)), max_size=6)


@given(LEVELS, st.randoms(use_true_random=False), st.integers(0, 200))
@settings(max_examples=200, deadline=None)
def test_incremental_level_equals_the_definition(levels, chance, resumed_at):
    """Losses stay around several levels in turn; a resumed history gives the same answers."""
    losses = [level + chance.gauss(0.0, 0.1) for level, steps in levels for _ in range(steps)]
    records = steps_of(*losses)
    history = History(records[:resumed_at])
    for done in range(min(resumed_at, len(losses)), len(losses) + 1):
        assert history.level_before_divergence() == level_by_definition(losses[:done])
        if done < len(losses):
            history.add_step(records[done])


def test_cost_of_a_step_is_independent_of_the_history():
    """With a hundred times as many records, no more of them are read."""

    class Counted(list):
        seen = 0

        def __getitem__(self, index):
            found = super().__getitem__(index)
            self.seen += len(found) if isinstance(index, slice) else 1
            return found

    costs = []
    for steps in (200, 20_000):
        history = History(steps_of(*[1.0] * steps))
        history.steps = Counted(history.steps)
        for record in steps_of(*[1.0] * DIVERGED_STEPS):
            history.add_step(record)
            history.level_before_divergence()
        costs.append(history.steps.seen)
    assert costs == [DIVERGED_STEPS * (DIVERGED_STEPS + 1)] * 2


def test_diverged_run_ends_with_loss_diverged():
    with pytest.raises(RunError, match=r"the loss was 2\.000 and has been more than 1\.5 above that for 20") as caught:
        check_divergence(History(steps_of(*[2.0] * 40, *[9.0] * 20)))
    assert (caught.value.reason, caught.value.step) == (Reason.LOSS_DIVERGED, 60)


def test_early_stopping_ends_the_loop_with_the_best_adapter():
    """With a learning rate that is far too high, the first validation is the best."""
    validations, trainable = [], make_trainable()
    training = {"evaluate_every": 1, "keep": "best", "early_stopping": EarlyStoppingSpec(patience=2)}
    loop = make_test_loop(trainable, token_rows(8), steps=50, learning_rate=0.3, max_grad_norm=1000.0, **training)
    loop = dataclasses.replace(loop, held_out=token_rows(8, seed=5))
    history = loop.run(StopFlag(), dataclasses.replace(NO_CALLBACKS, on_validation=validations.append))
    assert validations == history.validations
    best = best_validation(validations)
    assert len(history.steps) == best.step + 2 < 50
    repeated = make_trainable()
    shorter = make_test_loop(repeated, token_rows(8), steps=50, learning_rate=0.3, max_grad_norm=1000.0)
    for step in range(best.step):
        shorter.step(step)
    assert all((one == other).all() for one, other in zip(weights_of(trainable), weights_of(repeated), strict=True))
