"""The training loop: output heads, micro-batches, stops and learning rates."""

import dataclasses
import math
import weakref

import pytest
import torch

from qlora_api.reasons import Reason
from qlora_api.report import StepRecord
from qlora_api.v1alpha1 import LoraSpec, TrainingSpec
from qlora_trainer.data.batching import collate, split_micro_batches
from qlora_trainer.data.tokenization import TokenRow
from qlora_trainer.errors import RunError
from qlora_trainer.evaluation.evaluator import compute_metrics
from qlora_trainer.model.base_model import TrainableModel, attach_lora, head_is_plain, load_base
from qlora_trainer.runtime.shutdown import StopFlag
from qlora_trainer.training.loop import Schedule
from tests.unit.trainer.tiny import CPU, make_model, write_model
from tests.unit.trainer.tuned import NF4, NO_CALLBACKS, SETTINGS, make_test_loop, make_trainable, run_steps, token_rows

ONE = torch.ones(())


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_model(folder)
    return folder


def test_model_with_modified_logits_uses_its_own_head():
    class Capped(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner
            self.base_model, self.device = inner.base_model, CPU

        def forward(self, **inputs):
            output = self.inner(**inputs)
            output.logits = 3.0 * torch.tanh(output.logits / 3.0)
            return output

        def get_output_embeddings(self):
            return self.inner.get_output_embeddings()

        def get_input_embeddings(self):
            return self.inner.get_input_embeddings()

    assert head_is_plain(make_model())
    assert not head_is_plain(Capped(make_model()))
    trainable, batch = make_trainable(), collate(token_rows(4), CPU, packing=True)
    own = dataclasses.replace(trainable, plain_head=False)
    torch.testing.assert_close(own.loss_sum(batch, ONE), trainable.loss_sum(batch, ONE))


def test_chunked_head_in_bf16_rounds_like_the_model(model_folder):
    gradients = []
    for plain_head in (True, False):
        base = load_base(model_folder, NF4, torch.bfloat16, "sdpa", "cpu")
        settings = dataclasses.replace(SETTINGS, dtype=torch.bfloat16)
        trainable = attach_lora(base, LoraSpec(rank=4, dropout=0.0), 1, settings)
        trainable = dataclasses.replace(trainable, plain_head=plain_head)
        trainable.wrapped.train()
        trainable.loss_sum(collate(token_rows(6), CPU, packing=True), ONE / 77).backward()
        gradients.append([parameter.grad for parameter in trainable.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_packed_rows_stay_below_the_token_limit():
    long, short = TokenRow(tuple(range(5000)), ()), TokenRow(tuple(range(3000)), ())
    sizes = [len(group) for group in split_micro_batches([short, short, long, short], 8, packing=True)]
    assert sizes == [1, 1, 1, 1]
    assert [len(group) for group in split_micro_batches([short] * 5, 2, packing=False)] == [2, 2, 1]


def test_model_with_disabled_adapter_equals_the_base():
    trainable, rows = make_trainable(), token_rows(8)
    with trainable.evaluating(adapter=False):
        before = compute_metrics(trainable, rows, 4, packing=True)
    run_steps(make_test_loop(trainable, rows))
    with trainable.evaluating(adapter=False):
        assert compute_metrics(trainable, rows, 4, packing=True) == before
    with trainable.evaluating():
        assert compute_metrics(trainable, rows, 4, packing=True).loss < before.loss


def test_stop_takes_effect_after_the_step_with_a_checkpoint():
    stop, seen, decisions, saved = StopFlag(), [], [], []

    def on_step(record: StepRecord) -> None:
        seen.append(record.step)
        stop.requested = record.step == 2

    def should_checkpoint(step, last) -> bool:
        decisions.append((step, last))
        return True

    callbacks = dataclasses.replace(
        NO_CALLBACKS,
        on_step=on_step,
        should_checkpoint=should_checkpoint,
        checkpoint=lambda state, _: saved.append(len(state.history.steps)),
    )
    with pytest.raises(RunError) as caught:
        make_test_loop(make_trainable(), token_rows(8)).run(stop, callbacks)
    assert (caught.value.reason, caught.value.step, seen) == (Reason.INTERRUPTED, 2, [1, 2])
    assert (decisions, saved) == ([(1, False), (2, True)], [1, 2])


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, (1 + math.cos(math.pi / 4)) / 2, 0.5, (1 + math.cos(3 * math.pi / 4)) / 2]),
    ],
)
def test_learning_rate_of_each_scheduler(scheduler, expected):
    schedule = Schedule(TrainingSpec(learning_rate=1.0, warmup_ratio=0.3, scheduler=scheduler), 1, 6)
    assert [schedule.learning_rate(step) for step in range(6)] == pytest.approx(expected)


def test_micro_batch_graph_is_freed_before_the_next(monkeypatch):
    """The graph holds inputs of checkpointed layers, and with 8-bit layers every activation."""
    losses: list[weakref.ref] = []
    original = TrainableModel.loss_sum

    def watch(trainable, batch, weight):
        assert not [loss for loss in losses if loss() is not None]
        loss = original(trainable, batch, weight)
        losses.append(weakref.ref(loss))
        return loss

    monkeypatch.setattr(TrainableModel, "loss_sum", watch)
    run_steps(make_test_loop(make_trainable(), token_rows(16), micro_batch=2, steps=1))
    assert len(losses) == 4
