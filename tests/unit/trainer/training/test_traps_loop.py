"""Known mistakes of training loops that this one does not make: loss normalization, sharding, order, evaluation."""

import dataclasses
import json
import math

import pytest
import torch

from qlora_api.reasons import Reason
from qlora_api.report import StepRecord
from qlora_api.v1alpha1 import LoraSpec
from qlora_trainer.data.batching import collate, epoch_permutation, sample_step
from qlora_trainer.data.tokenization import TokenRow
from qlora_trainer.distributed.world import World
from qlora_trainer.errors import RunError
from qlora_trainer.evaluation.evaluator import compute_metrics
from qlora_trainer.model import base_model as model_module
from qlora_trainer.model.base_model import attach_lora, load_base
from qlora_trainer.runtime.shutdown import StopFlag
from qlora_trainer.training.health import MAX_SKIPPED_STEPS, check_finite, check_trained, describe_skipped
from qlora_trainer.training.loop import TrainingLoop
from qlora_trainer.training.state import History, TrainingState
from tests.unit.trainer.tiny import CPU, write_model
from tests.unit.trainer.tuned import (
    NF4,
    NO_CALLBACKS,
    SETTINGS,
    make_test_loop,
    make_trainable,
    run_steps,
    token_rows,
    weights_of,
)

ONE = torch.ones(())


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_model(folder)
    return folder


@pytest.mark.parametrize("micro_batch", [1, 3, 8])
def test_trap_01_micro_batches_do_not_change_a_step(micro_batch):
    rows = token_rows(12)  # the second step has only four rows
    full_batch, split_batch = make_trainable(), make_trainable()
    expected = run_steps(make_test_loop(full_batch, rows, micro_batch=8))
    found = run_steps(make_test_loop(split_batch, rows, micro_batch=micro_batch))
    assert [record.loss for record in found] == pytest.approx([record.loss for record in expected], rel=1e-5)
    for one, other in zip(weights_of(full_batch), weights_of(split_batch), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_trap_01_loss_is_normalized_by_the_labels_of_the_step():
    trainable, rows = make_trainable(), token_rows(8)
    batch = collate(rows, CPU, packing=True)
    expected = float(trainable.loss_sum(batch, ONE).detach()) / len(batch.labels)
    assert make_test_loop(trainable, rows).step(0).loss == pytest.approx(expected, rel=1e-5)


def test_trap_02_rows_of_a_step_are_sharded_over_two_ranks():
    world = World(CPU, rank=1, size=2)
    assert [*World(CPU, rank=0, size=2).shard(range(5)), *world.shard(range(5))] == [0, 2, 4, 1, 3]


def test_trap_07_row_without_labels_adds_no_loss_and_no_nan():
    rows = token_rows(7)
    clean, with_empty_row = make_trainable(), make_trainable()
    expected = make_test_loop(clean, rows, micro_batch=1).step(0)
    found = make_test_loop(with_empty_row, (*rows, TokenRow((5, 6, 7), ())), micro_batch=1).step(0)
    assert (found.loss, found.grad_norm) == pytest.approx((expected.loss, expected.grad_norm), rel=1e-5)


def test_trap_28_row_order_depends_only_on_seed_and_epoch():
    assert epoch_permutation(3, 100, 7) == epoch_permutation(3, 100, 7)
    assert epoch_permutation(3, 100, 7) != epoch_permutation(4, 100, 7)
    assert epoch_permutation(3, 100, 7) != epoch_permutation(3, 100, 8)
    epoch = [row for step in range(3) for row in sample_step(step, 10, 4, 7)]
    assert sorted(epoch) == list(range(10))
    assert epoch_permutation(0, 6, 42) == GOLDEN_ORDER


GOLDEN_ORDER = tuple(torch.randperm(6, generator=torch.Generator().manual_seed(42 << 20)).tolist())


def gradients_after(folder, *, evaluate_between: bool) -> list[torch.Tensor]:
    base = load_base(folder, NF4, torch.bfloat16, "sdpa", "cpu")
    settings = dataclasses.replace(SETTINGS, dtype=torch.bfloat16)
    trainable = attach_lora(base, LoraSpec(rank=4, dropout=0.0, targets=("all-linear",)), 1, settings)
    rows = token_rows(6)
    if evaluate_between:
        with trainable.evaluating():
            compute_metrics(trainable, rows, 1, packing=True)
            trainable.model(input_ids=torch.tensor([[5]]), use_cache=False)
    trainable.wrapped.train()
    trainable.loss_sum(collate(rows, CPU, packing=True), ONE).backward()
    return [parameter.grad for parameter in trainable.parameters()]


def test_trap_29_evaluation_does_not_change_later_gradients(model_folder):
    plain = gradients_after(model_folder, evaluate_between=False)
    evaluated = gradients_after(model_folder, evaluate_between=True)
    assert all(torch.equal(one, other) for one, other in zip(plain, evaluated, strict=True))


@pytest.mark.skipif(
    not torch.cpu.get_capabilities().get("avx512_bf16"), reason="the fault exists with AVX512-BF16 only"
)
# torch's warning about the fault: the kernel for repacked weights has no gradient.
@pytest.mark.filterwarnings("ignore:bitsandbytes..gemv_4bit. an autograd kernel was not registered:UserWarning")
def test_trap_29_evaluation_with_repacking_corrupts_gradients(model_folder, monkeypatch):
    plain = gradients_after(model_folder, evaluate_between=False)
    monkeypatch.setattr(model_module, "disable_weight_repacking", lambda _: None)
    evaluated = gradients_after(model_folder, evaluate_between=True)
    assert not all(other is not None and torch.equal(one, other) for one, other in zip(plain, evaluated, strict=True))


def test_trap_29_dropout_does_not_depend_on_what_ran_before():
    rows = token_rows(8)
    quiet, busy = make_trainable(dropout=0.2), make_trainable(dropout=0.2)
    first, second = make_test_loop(quiet, rows), make_test_loop(busy, rows)
    for step in range(3):
        first.step(step)
        second.step(step)
        with busy.evaluating():
            torch.randn(17)
            compute_metrics(busy, rows, 2, packing=True)
    assert all(torch.equal(one, other) for one, other in zip(weights_of(quiet), weights_of(busy), strict=True))


def test_trap_29_evaluating_restores_mode_and_random_numbers():
    trainable = make_trainable()
    trainable.wrapped.train()
    before = torch.get_rng_state()
    with trainable.evaluating(adapter=False):
        torch.randn(3)
        assert not trainable.wrapped.training
    assert trainable.wrapped.training
    assert torch.equal(torch.get_rng_state(), before)


def test_trap_27_metrics_do_not_depend_on_batches():
    trainable, rows = make_trainable(), token_rows(9)
    found = [compute_metrics(trainable, rows, size, packing=packing) for size in (1, 4) for packing in (True, False)]
    assert len({metrics.token_accuracy for metrics in found}) == 1
    assert [metrics.loss for metrics in found] == pytest.approx([found[0].loss] * 4, rel=1e-5)
    assert found[0].perplexity == pytest.approx(math.exp(found[0].loss))


@pytest.mark.parametrize(
    ("loss", "norm", "scaling", "accepted"),
    [
        (1.0, 1.0, False, True),
        (math.nan, 1.0, False, False),
        (math.inf, 1.0, True, False),
        (1.0, math.inf, False, False),
        (1.0, math.inf, True, True),
    ],
)
def test_trap_26_non_finite_loss_ends_the_run_with_its_step(loss, norm, scaling, accepted):
    record = StepRecord(step=7, loss=loss, learning_rate=0.5, grad_norm=norm, tokens=1, seconds=1.0)
    if accepted:
        check_finite(record, scaling=scaling)
        return
    with pytest.raises(RunError, match="step 7 has") as caught:
        check_finite(record, scaling=scaling)
    assert (caught.value.reason, caught.value.step) == (Reason.NON_FINITE_LOSS, 7)


def fp16_loop(folder, steps: int, *, dtype=torch.float16, **training) -> TrainingLoop:
    base = load_base(folder, NF4, dtype, "sdpa", "cpu")
    settings = dataclasses.replace(SETTINGS, dtype=dtype)
    trainable = attach_lora(base, LoraSpec(rank=4, dropout=0.0), 1, settings)
    return make_test_loop(trainable, token_rows(8), runtime_settings=settings, steps=steps, **training)


@pytest.mark.parametrize("steps", [3, 60])
def test_trap_42_fp16_gradients_that_are_never_finite_end_the_run(model_folder, steps):
    loop = fp16_loop(model_folder, steps)
    for parameter in loop.trainable.parameters():
        parameter.register_hook(lambda gradient: gradient * math.nan)
    before = weights_of(loop.trainable)
    with pytest.raises(RunError, match=r"nothing is trained; in fp16.*spec\.resources\.gpuProduct") as caught:
        run_steps(loop)
    assert caught.value.reason == Reason.NON_FINITE_LOSS
    assert caught.value.step == min(steps, MAX_SKIPPED_STEPS)
    assert all(torch.equal(one, other) for one, other in zip(before, weights_of(loop.trainable), strict=True))


def test_fp16_gradients_that_overflow_at_first_are_trained_and_the_skipped_steps_counted(model_folder):
    loop, calls = fp16_loop(model_folder, steps=6), []

    def overflow_twice(gradient: torch.Tensor) -> torch.Tensor:
        calls.append(None)
        return gradient * math.inf if len(calls) <= 4 else gradient  # two micro-batches a step

    loop.trainable.parameters()[-1].register_hook(overflow_twice)
    history = loop.run(StopFlag(), NO_CALLBACKS)
    assert [math.isfinite(record.grad_norm) for record in history.steps] == [False] * 2 + [True] * 4
    assert list(describe_skipped(history)) == [
        "2 of 6 steps were skipped while fp16 loss scaling searched for its scale"
    ]


def test_trap_43_fp16_run_resumes_like_an_uninterrupted_one(model_folder):
    uninterrupted, first, second = (fp16_loop(model_folder, steps=4) for _ in range(3))
    expected = run_steps(uninterrupted)
    states: list[TrainingState] = []
    callbacks = dataclasses.replace(
        NO_CALLBACKS,
        should_checkpoint=lambda step, last: step == 2,  # noqa: ARG005
        checkpoint=lambda state, last: states.append(state),  # noqa: ARG005
    )
    first.run(StopFlag(), callbacks)
    as_json = json.loads(json.dumps({name: float(value) for name, value in states[0].scaler.items()}))
    resumed = second.run(StopFlag(), NO_CALLBACKS, dataclasses.replace(states[0], scaler=as_json))
    assert [record.loss for record in resumed.steps] == [record.loss for record in expected]
    assert second.engine.scaler_state() == uninterrupted.engine.scaler_state()
    both = zip(weights_of(uninterrupted.trainable), weights_of(second.trainable), strict=True)
    assert all(torch.equal(one, other) for one, other in both)
    another_gpu = fp16_loop(model_folder, steps=4, dtype=torch.float32)
    assert len(another_gpu.run(StopFlag(), NO_CALLBACKS, states[0]).steps) == len(expected)


def test_weights_that_no_step_changed_are_not_a_result():
    record = StepRecord(step=1, loss=2.0, learning_rate=0.1, grad_norm=0.0, tokens=1, seconds=1.0)
    with pytest.raises(RunError, match="none of 2 steps had finite gradients other than zero"):
        check_trained(History([record, record.model_copy(update={"step": 2})]))
    check_trained(History([record, record.model_copy(update={"step": 2, "grad_norm": 0.1})]))
