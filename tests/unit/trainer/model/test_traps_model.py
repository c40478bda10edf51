"""Known mistakes of other trainers, around models: packing, dtypes, kernels, heads (traps 8 to 36)."""

import dataclasses
from importlib.metadata import requires, version
from itertools import pairwise

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from torch.nn import functional

from qlora_api.reasons import Reason
from qlora_api.v1alpha1 import LoraSpec, QuantizationSpec
from qlora_trainer.data.batching import collate
from qlora_trainer.distributed.world import join_world
from qlora_trainer.errors import RunError
from qlora_trainer.model.architecture import load_architecture
from qlora_trainer.model.attention import attention_facts, choose_attention
from qlora_trainer.model.base_model import TrainableModel, attach_lora, load_base, load_text_config, packing_is_exact
from qlora_trainer.model.hardware import Hardware
from qlora_trainer.model.runtime_settings import compute_dtype
from qlora_trainer.model.target_modules import check_modules
from qlora_trainer.training.loop import check_gradients
from tests.unit.trainer.families import write_family
from tests.unit.trainer.tiny import CPU, make_model, make_spec, write_model
from tests.unit.trainer.tuned import NF4, SETTINGS, make_test_loop, make_trainable, run_steps, token_rows, weights_of

ONE = torch.ones(())
T4 = Hardware("cuda", (7, 5), native_bf16=False, free_bytes=15 << 30, name="Tesla T4", flash_attention=True)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_model(folder)
    return folder


def trainable_in(dtype: torch.dtype, folder, **lora) -> TrainableModel:
    """An adapter on a 4-bit base that computes in a dtype."""
    base = load_base(folder, NF4, dtype, "sdpa", "cpu")
    return attach_lora(
        base, LoraSpec(**{"rank": 4, "dropout": 0} | lora), 1, dataclasses.replace(SETTINGS, dtype=dtype)
    )


@pytest.mark.parametrize("spans", [1, 2])
@pytest.mark.parametrize("packing", [True, False])
def test_trap_08_batched_rows_have_the_loss_of_single_rows(packing, spans):
    trainable, rows = make_trainable(), token_rows(5, spans=spans)
    expected = 0.0
    for row in rows:
        ids = torch.tensor([row.input_ids])
        logits = trainable.model(input_ids=ids).logits[0]
        for start, end in row.label_spans:
            labels = ids[0, start:end]
            expected += float(functional.cross_entropy(logits[start - 1 : end - 1], labels, reduction="sum").detach())
    batch = collate(rows, CPU, packing=packing)
    assert float(trainable.loss_sum(batch, ONE).detach()) == pytest.approx(expected, rel=1e-5)
    assert float(trainable.statistics(batch)[0].sum()) == pytest.approx(expected, rel=1e-5)


def test_trap_08_the_first_token_of_a_packed_row_is_never_a_label():
    rows = token_rows(6, spans=2)
    batch = collate(rows, CPU, packing=True)
    starts, position = set(), 0
    for row in rows:
        starts.add(position)
        position += len(row.input_ids)
    assert not starts & {label + 1 for label in batch.label_positions.tolist()}
    assert len(batch.labels) == sum(row.label_count for row in rows)


def test_trap_08_packing_is_off_for_models_that_leak_state():
    assert packing_is_exact(make_model())


@pytest.mark.parametrize("change", [{"use_cache": True}, {"attention_mask": True}, {"position_ids": None}])
def test_trap_08_cache_mask_or_missing_positions_break_packing(change):
    model, rows = make_model(), token_rows(2)
    batch = collate(rows, CPU, packing=True)
    inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
    if change.get("attention_mask"):
        change = {"attention_mask": torch.ones_like(batch.input_ids)}
    with torch.no_grad():
        separate = model(input_ids=torch.tensor([rows[1].input_ids]), use_cache=False).logits[0]
        packed, wrong = (model(**inputs | extra).logits[0, len(rows[0].input_ids) :] for extra in ({}, change))
    torch.testing.assert_close(packed, separate)
    assert float((wrong - separate).abs().max()) > 0.1


@pytest.mark.parametrize(("bits", "kind"), [(4, "Linear4bit"), (8, "Linear8bitLt"), (16, "Linear")])
def test_trap_10_base_is_not_upcast_and_adapter_is_fp32(model_folder, bits, kind):
    base = load_base(model_folder, QuantizationSpec(bits=bits), torch.bfloat16, "sdpa", "cpu")
    assert type(base.model.layers[0].self_attn.q_proj).__name__ == kind
    trainable = attach_lora(base, LoraSpec(), 1, dataclasses.replace(SETTINGS, dtype=torch.bfloat16))
    assert {parameter.dtype for parameter in trainable.parameters()} == {torch.float32}
    rest = [weight for name, weight in base.named_parameters() if "lora_" not in name]
    assert {weight.dtype for weight in rest} <= {torch.bfloat16, torch.uint8, torch.int8}
    assert all("lora_" in name for name, parameter in trainable.wrapped.named_parameters() if parameter.requires_grad)
    assert not any(isinstance(part, Linear4bit) and part.support_avx512bf16_for_cpu for part in base.modules())


def test_trap_11_missing_gradients_end_the_run():
    trainable = make_trainable()
    with pytest.raises(RunError, match="no gradient reaches 8 weights") as caught:
        check_gradients(make_test_loop(trainable, token_rows(8)).engine.gradients())
    assert caught.value.reason == Reason.TRAINER_ERROR


def test_trap_11_checkpointed_layers_get_the_same_gradients(model_folder):
    norms = []
    for checkpointing in (True, False):
        base = load_base(model_folder, NF4, torch.float32, "sdpa", "cpu")
        settings = dataclasses.replace(SETTINGS, gradient_checkpointing=checkpointing)
        trainable = attach_lora(base, LoraSpec(rank=4, dropout=0), 1, settings)
        norms.append(make_test_loop(trainable, token_rows(8)).step(0).grad_norm)
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert norms[0] > 0


def test_trap_12_activations_are_recomputed_without_reentry(model_folder):
    base = load_base(model_folder, NF4, torch.float32, "sdpa", "cpu")
    trainable = attach_lora(base, LoraSpec(rank=4), 1, dataclasses.replace(SETTINGS, gradient_checkpointing=True))
    layers = [layer for layer in trainable.model.modules() if getattr(layer, "gradient_checkpointing", False)]
    assert layers
    assert all(layer._gradient_checkpointing_func.keywords == {"use_reentrant": False} for layer in layers)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_trap_13_4_bit_weights_equal_the_base_and_do_not_change(model_folder, kind, double_quant):
    wanted = load_base(model_folder, QuantizationSpec(bits=16), torch.float32, "sdpa", "cpu")
    stored = QuantizationSpec(bits=4, type=kind, double_quant=double_quant)
    base = load_base(model_folder, stored, torch.float32, "sdpa", "cpu")
    parts = [(name, part) for name, part in base.named_modules() if isinstance(part, Linear4bit)]
    before = [dequantize_4bit(part.weight.data, part.weight.quant_state) for _, part in parts]
    for (name, part), weight in zip(parts, before, strict=True):
        original = wanted.get_submodule(name).weight
        assert float((weight - original).norm() / original.norm()) < {"nf4": 0.11, "fp4": 0.15}[kind]
        assert (part.weight.quant_state.quant_type, part.weight.quant_state.nested) == (kind, double_quant)
    trainable = attach_lora(base, LoraSpec(rank=4, targets=("all-linear",)), 1, SETTINGS)
    run_steps(make_test_loop(trainable, token_rows(8)))
    kept = [part for part in trainable.model.modules() if isinstance(part, Linear4bit)]
    after = [dequantize_4bit(part.weight.data, part.weight.quant_state) for part in kept]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_trap_21_fp16_scales_gradients_and_adapter_stays_fp32(model_folder):
    trainable = trainable_in(torch.float16, model_folder)
    settings = dataclasses.replace(SETTINGS, dtype=torch.float16)
    loop = make_test_loop(trainable, token_rows(8), runtime_settings=settings, steps=3)
    assert loop.engine.scaler.is_enabled()
    before = weights_of(trainable)
    run_steps(loop)
    assert {weight.dtype for weight in trainable.parameters()} == {torch.float32}
    assert not any(torch.equal(one, other) for one, other in zip(before, weights_of(trainable), strict=True))
    assert not make_test_loop(trainable_in(torch.bfloat16, model_folder), token_rows(8)).engine.scaler.is_enabled()


def test_trap_22_fp16_that_overflows_ends_the_run(model_folder, monkeypatch):
    trainable, settings = trainable_in(torch.float16, model_folder), dataclasses.replace(SETTINGS, dtype=torch.float16)
    real = TrainableModel.loss_sum
    monkeypatch.setattr(TrainableModel, "loss_sum", lambda self, batch, weight: real(self, batch, weight) * torch.inf)
    with pytest.raises(RunError, match="step 1 has loss inf") as caught:
        run_steps(make_test_loop(trainable, token_rows(8), runtime_settings=settings))
    assert caught.value.reason == Reason.NON_FINITE_LOSS


def test_trap_23_a_t4_computes_in_fp16_with_sdpa(model_folder):
    kernel, why = choose_attention(attention_facts(load_text_config(model_folder)), T4)
    assert (compute_dtype(T4, "llama")[0], kernel) == (torch.float16, "sdpa")
    assert "sm_75 is older than sm_80" in why


def test_trap_24_dora_magnitudes_train_with_bf16(model_folder):
    trainable = trainable_in(torch.bfloat16, model_folder, dora=True)
    settings = dataclasses.replace(SETTINGS, dtype=torch.bfloat16)
    names = [name for name, weight in trainable.wrapped.named_parameters() if weight.requires_grad]
    before = weights_of(trainable)
    run_steps(make_test_loop(trainable, token_rows(8), runtime_settings=settings, learning_rate=1e-4))
    moved = [not torch.equal(one, other) for one, other in zip(before, weights_of(trainable), strict=True)]
    magnitudes = [moves for name, moves in zip(names, moved, strict=True) if "magnitude" in name]
    assert (len(magnitudes), all(moved)) == (4, True)


def test_trap_25_updates_far_below_the_precision_of_bf16_add_up(model_folder):
    trainable = trainable_in(torch.bfloat16, model_folder, init="gaussian")
    settings = dataclasses.replace(SETTINGS, dtype=torch.bfloat16)
    first = next(weight for name, weight in trainable.wrapped.named_parameters() if "lora_A" in name)
    seen = [first.detach().clone()]
    loop = make_test_loop(trainable, token_rows(8), runtime_settings=settings, learning_rate=1e-6, steps=4)
    for step in range(4):
        loop.step(step)
        seen.append(first.detach().clone())
    # In the first step A's gradient is zero, as B is.
    assert not any(torch.equal(one, other) for one, other in pairwise(seen[1:]))
    # A bf16 adapter would not have changed:
    assert (seen[0].bfloat16() == seen[-1].bfloat16()).float().mean() > 0.99


def test_trap_32_nothing_is_compiled(model_folder, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("torch.compile fails with bitsandbytes, dropout and recomputation (peft#3020)")

    monkeypatch.setattr(torch, "compile", refuse)
    base = load_base(model_folder, NF4, torch.float32, "sdpa", "cpu")
    trainable = attach_lora(
        base, LoraSpec(rank=4, dropout=0.1), 1, dataclasses.replace(SETTINGS, gradient_checkpointing=True)
    )
    run_steps(make_test_loop(trainable, token_rows(8), steps=1))
    assert not any(hasattr(part, "_orig_mod") for part in trainable.wrapped.modules())


def test_trap_33_transformers_quantizes_while_loading():
    # Before 5.23 weights were loaded asynchronously, in 16 bits and all at once (transformers#43032).
    assert tuple(int(part) for part in version("transformers").split(".")[:2]) >= (5, 23)
    assert any(need.startswith("transformers") and ">=5.23" in need for need in requires("qlora-operator") or ())


def test_trap_34_capped_scores_are_capped(tmp_path):
    write_family("gemma2", tmp_path)
    facts = attention_facts(load_text_config(tmp_path))
    a100 = Hardware("cuda", (8, 0), native_bf16=True, free_bytes=40 << 30, name="A100", flash_attention=True)
    assert choose_attention(facts, a100)[0] == "eager"
    base = load_base(tmp_path, QuantizationSpec(bits=16), torch.float32, "eager", "cpu")
    capped = base(input_ids=torch.tensor([[3, 5, 7, 9]]), use_cache=False).logits
    for layer in base.model.layers:
        layer.self_attn.attn_logit_softcapping = 0.01
    tighter = base(input_ids=torch.tensor([[3, 5, 7, 9]]), use_cache=False).logits
    assert float((capped - tighter).detach().abs().max()) > 0.01
    with pytest.raises(RunError, match="scaled_dot_product_attention"):
        load_base(tmp_path, QuantizationSpec(bits=16), torch.float32, "sdpa", "cpu")


def test_trap_35_more_gpus_than_processes_are_left_alone(model_folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert join_world("cpu").size == 1
    trainable = trainable_in(torch.float32, model_folder)
    assert not any(isinstance(part, torch.nn.DataParallel) for part in trainable.wrapped.modules())


@pytest.mark.parametrize("targets", [("lm_head",), ("all-linear",)])
def test_trap_36_output_layer_never_gets_an_adapter(model_folder, targets):
    architecture, spec = (
        load_architecture(model_folder),
        make_spec("file:///m", "file:///d", "file:///o", lora={"targets": targets}),
    )
    if targets == ("lm_head",):
        with pytest.raises(RunError, match="no linear module lm_head to adapt"):
            check_modules(architecture, spec)
        return
    check_modules(architecture, spec)
    trainable = trainable_in(torch.float32, model_folder, targets=targets)
    assert type(trainable.model.get_output_embeddings()) is torch.nn.Linear


@pytest.mark.parametrize("tied", [True, False])
def test_trap_36_trainable_head_gets_the_gradients_of_torch(tmp_path, tied):
    write_model(tmp_path, tie_word_embeddings=tied)
    trainable = trainable_in(torch.float32, tmp_path, modules_to_save=("lm_head",))
    trainable.wrapped.train()
    batch = collate(token_rows(5), CPU, packing=True)
    gradients = []
    for plain in (True, False):  # in chunks, or by torch's own cross-entropy of all logits
        trainable.wrapped.zero_grad()
        dataclasses.replace(trainable, plain_head=plain).loss_sum(batch, ONE).backward()
        gradients.append([weight.grad.clone() for weight in trainable.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
