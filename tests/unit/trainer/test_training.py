"""The numbers of training: packing, chunked loss, gradients, schedules (traps 8, 10 and 11)."""

import dataclasses
import math

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch.nn import functional

from qlora_api.names import Reason
from qlora_api.report import StepRecord
from qlora_api.v1alpha1 import LoraSpec, QuantizationSpec, TrainingSpec
from qlora_trainer.batches import make_batch, micro_batches
from qlora_trainer.errors import RunError
from qlora_trainer.evaluate import evaluate
from qlora_trainer.interrupt import StopFlag
from qlora_trainer.model import head_is_plain, joins_rows_exactly, load_base, tune
from qlora_trainer.tokens import TokenRow
from qlora_trainer.train import Schedule, check_gradients
from tests.unit.trainer.tiny import CPU, make_model, write_model
from tests.unit.trainer.tuned import CHOICES, DEAF, NF4, make_test_loop, make_tuned, run_steps, token_rows

ONE = torch.ones(())


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_model(folder)
    return folder


@pytest.mark.parametrize("spans", [1, 2])
@pytest.mark.parametrize("packing", [True, False])
def test_rows_in_a_batch_have_the_loss_they_have_alone(packing, spans):
    tuned, rows = make_tuned(), token_rows(5, spans=spans)
    expected = 0.0
    for row in rows:
        ids = torch.tensor([row.input_ids])
        logits = tuned.causal(input_ids=ids).logits[0]
        for start, end in row.learned:
            wanted = ids[0, start:end]
            expected += float(functional.cross_entropy(logits[start - 1 : end - 1], wanted, reduction="sum").detach())
    batch = make_batch(rows, CPU, packing=packing)
    assert float(tuned.loss_sum(batch, ONE).detach()) == pytest.approx(expected, rel=1e-5)
    assert float(tuned.statistics(batch)[0].sum()) == pytest.approx(expected, rel=1e-5)


def test_the_first_token_of_a_joined_row_is_never_a_label():
    rows = token_rows(6, spans=2)
    batch = make_batch(rows, CPU, packing=True)
    starts, place = set(), 0
    for row in rows:
        starts.add(place)
        place += len(row.input_ids)
    assert not starts & {position + 1 for position in batch.chosen.tolist()}
    assert len(batch.labels) == sum(row.label_count for row in rows)


def test_joined_rows_are_checked_for_state_that_leaks():
    assert joins_rows_exactly(make_model())


def test_a_model_that_changes_its_logits_keeps_its_own_head():
    class Capped(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner
            self.base_model, self.device = inner.base_model, CPU

        def forward(self, **inputs):
            made = self.inner(**inputs)
            made.logits = 3.0 * torch.tanh(made.logits / 3.0)
            return made

        def get_output_embeddings(self):
            return self.inner.get_output_embeddings()

        def get_input_embeddings(self):
            return self.inner.get_input_embeddings()

    assert head_is_plain(make_model())
    assert not head_is_plain(Capped(make_model()))
    tuned, batch = make_tuned(), make_batch(token_rows(4), CPU, packing=True)
    own = dataclasses.replace(tuned, plain_head=False)
    torch.testing.assert_close(own.loss_sum(batch, ONE), tuned.loss_sum(batch, ONE))


def test_in_16_bits_the_head_in_pieces_rounds_as_the_model_does(model_folder):
    gradients = []
    for plain_head in (True, False):
        base = load_base(model_folder, NF4, torch.bfloat16, "sdpa", "cpu")
        choices = dataclasses.replace(CHOICES, dtype=torch.bfloat16)
        tuned = dataclasses.replace(tune(base, LoraSpec(rank=4, dropout=0.0), 1, choices), plain_head=plain_head)
        tuned.peft.train()
        tuned.loss_sum(make_batch(token_rows(6), CPU, packing=True), ONE / 77).backward()
        gradients.append([parameter.grad for parameter in tuned.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_joined_rows_stay_below_the_limit_unless_one_row_is_longer():
    long, short = TokenRow(tuple(range(5000)), ()), TokenRow(tuple(range(3000)), ())
    sizes = [len(group) for group in micro_batches([short, short, long, short], 8, packing=True)]
    assert sizes == [1, 1, 1, 1]
    assert [len(group) for group in micro_batches([short] * 5, 2, packing=False)] == [2, 2, 1]


@pytest.mark.parametrize(("bits", "kind"), [(4, "Linear4bit"), (8, "Linear8bitLt"), (16, "Linear")])
def test_base_is_stored_as_asked_and_frozen_and_the_adapter_is_fp32(model_folder, bits, kind):
    base = load_base(model_folder, QuantizationSpec(bits=bits), torch.bfloat16, "sdpa", "cpu")
    assert type(base.model.layers[0].self_attn.q_proj).__name__ == kind
    assert base.get_input_embeddings().weight.dtype == torch.bfloat16
    tuned = tune(base, LoraSpec(), 1, dataclasses.replace(CHOICES, dtype=torch.bfloat16))
    assert {parameter.dtype for parameter in tuned.parameters()} == {torch.float32}
    assert all("lora_" in name for name, parameter in tuned.peft.named_parameters() if parameter.requires_grad)
    assert not any(isinstance(part, Linear4bit) and part.support_avx512bf16_for_cpu for part in base.modules())


def test_without_its_adapter_the_model_is_the_base():
    tuned, rows = make_tuned(), token_rows(8)
    with tuned.evaluating(adapter=False):
        before = evaluate(tuned, rows, 4, packing=True)
    run_steps(make_test_loop(tuned, rows))
    with tuned.evaluating(adapter=False):
        assert evaluate(tuned, rows, 4, packing=True) == before
    with tuned.evaluating():
        assert evaluate(tuned, rows, 4, packing=True).loss < before.loss


def test_missing_gradients_end_the_run():
    tuned = make_tuned()
    with pytest.raises(RunError, match="no gradient reaches 8 weights") as caught:
        check_gradients(tuned)
    assert caught.value.reason == Reason.TRAINER_ERROR


def test_checkpointed_layers_still_get_gradients(model_folder):
    base = load_base(model_folder, NF4, torch.float32, "sdpa", "cpu")
    tuned = tune(base, LoraSpec(rank=4), 1, dataclasses.replace(CHOICES, checkpointing=True))
    assert make_test_loop(tuned, token_rows(8)).step(0).grad_norm > 0


def test_a_stop_takes_effect_after_the_step_and_its_state_can_be_kept():
    stop, seen, kept = StopFlag(), [], []

    def note(record: StepRecord) -> None:
        seen.append(record.step)
        stop.requested = record.step == 2

    def offer(step, capture, last) -> None:
        kept.append((step, len(capture().history.steps), last))

    watcher = dataclasses.replace(DEAF, step=note, offer=offer)
    with pytest.raises(RunError) as caught:
        make_test_loop(make_tuned(), token_rows(8)).run(stop, watcher)
    assert (caught.value.reason, caught.value.step, seen) == (Reason.INTERRUPTED, 2, [1, 2])
    assert kept == [(1, 1, False), (2, 2, True)]


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, (1 + math.cos(math.pi / 4)) / 2, 0.5, (1 + math.cos(3 * math.pi / 4)) / 2]),
    ],
)
def test_learning_rate(scheduler, expected):
    schedule = Schedule(TrainingSpec(learning_rate=1.0, warmup_ratio=0.3, scheduler=scheduler), 1, 6)
    assert [schedule.learning_rate(step) for step in range(6)] == pytest.approx(expected)
