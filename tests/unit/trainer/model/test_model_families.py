"""Every supported family trains, packs rows exactly if it can, is published, loads and merges."""

import dataclasses

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import PeftModel
from transformers import AutoModelForCausalLM

from qlora_api.v1alpha1 import LoraSpec, QuantizationSpec
from qlora_trainer.data.batching import collate
from qlora_trainer.evaluation.evaluator import compute_row_statistics
from qlora_trainer.model.architecture import load_architecture
from qlora_trainer.model.attention import attention_facts, choose_attention
from qlora_trainer.model.base_model import (
    TrainableModel,
    attach_lora,
    head_is_plain,
    load_base,
    load_text_config,
    packing_is_exact,
)
from qlora_trainer.model.hardware import Hardware
from qlora_trainer.model.runtime_settings import RuntimeSettings
from qlora_trainer.publishing.publish import write_weights
from tests.unit.trainer.families import FAMILIES, write_family
from tests.unit.trainer.tiny import CPU, make_tokenizer
from tests.unit.trainer.tuned import SETTINGS, make_record, make_test_loop, run_steps, token_rows

DEVICE = Hardware("cpu", None, native_bf16=False, free_bytes=1 << 33, name="CPU")
ROWS = token_rows(8)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    path = tmp_path_factory.mktemp(family)
    write_family(family, path)
    return path


def settings(family: str) -> RuntimeSettings:
    """Runtime settings for a family, with packing if it is exact."""
    return dataclasses.replace(SETTINGS, packing=FAMILIES[family].packing_is_exact)


def load(folder, bits: int = 16):
    attention, _ = choose_attention(attention_facts(load_text_config(folder)), DEVICE)
    return load_base(folder, QuantizationSpec(bits=bits), torch.float32, attention, "cpu")


@pytest.fixture(scope="module")
def trained(family, folder) -> TrainableModel:
    """An adapter on every linear module after four steps."""
    trainable = attach_lora(load(folder), LoraSpec(rank=4, dropout=0, targets=("all-linear",)), 1, settings(family))
    run_steps(make_test_loop(trainable, ROWS, runtime_settings=settings(family)))
    return trainable


def logits_of(model) -> torch.Tensor:
    ids = torch.tensor([ROWS[0].input_ids])
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits


def test_family_facts_are_detected(family, folder):
    expected, base = FAMILIES[family], load(folder)
    assert base.config._attn_implementation.removesuffix("_unpacked") == expected.attention
    assert {name.rpartition(".")[2] for name in load_architecture(folder).linears} == expected.linears
    assert head_is_plain(base) == expected.plain_head
    assert packing_is_exact(base) == expected.packing_is_exact


def layouts(family: str) -> tuple[bool, ...]:
    """Values of `packing` that the family supports."""
    return (True, False) if FAMILIES[family].packing_is_exact else (False,)


def test_family_batched_loss_equals_single_row_loss(family, trained):
    with trained.evaluating():
        batched = [compute_row_statistics(trained, ROWS, 4, packing=packing) for packing in layouts(family)]
        separate = compute_row_statistics(trained, ROWS, 1, packing=False)
    for found in batched:
        assert [row.loss for row in found] == pytest.approx([row.loss for row in separate], rel=1e-4)


def gradients_of(trainable: TrainableModel, size: int, *, packing: bool) -> torch.Tensor:
    """Return the gradient of four rows in micro-batches of a size."""
    for weight in trainable.parameters():
        weight.grad = None
    for start in range(0, 4, size):
        trainable.loss_sum(collate(ROWS[start : start + size], CPU, packing=packing), torch.ones(())).backward()
    return torch.cat([weight.grad.flatten() for weight in trainable.parameters()])


def test_family_batched_gradients_equal_single_row_gradients(family, folder):
    trainable = attach_lora(
        load(folder), LoraSpec(rank=2, dropout=0, targets=("all-linear",), init="gaussian"), 1, settings(family)
    )
    separate = gradients_of(trainable, 1, packing=False)
    for packing in layouts(family):
        batched = gradients_of(trainable, 4, packing=packing)
        assert float((batched - separate).norm()) < 1e-4 * float(separate.norm())


def test_family_trains_and_gradient_checkpointing_is_exact(family, folder):
    lora, runtime_settings = LoraSpec(rank=4, dropout=0, targets=("all-linear",)), settings(family)
    for bits in FAMILIES[family].bits:
        trainable = attach_lora(load(folder, bits), lora, 1, runtime_settings)
        history = run_steps(make_test_loop(trainable, ROWS, steps=5, runtime_settings=runtime_settings))
        assert history[-1].loss < history[0].loss
        checkpointed = attach_lora(
            load(folder, bits), lora, 1, dataclasses.replace(runtime_settings, gradient_checkpointing=True)
        )
        again = run_steps(make_test_loop(checkpointed, ROWS, steps=2, runtime_settings=runtime_settings))
        assert [record.loss for record in again] == pytest.approx([record.loss for record in history[:2]], rel=1e-3)


@pytest.mark.parametrize(("bits", "layer"), [(4, Linear4bit), (8, Linear8bitLt)])
def test_family_quantizable_weights_are_counted(family, folder, bits, layer):
    quantizable = load_architecture(folder).quantizable
    layers = [module for module in load(folder, bits).modules() if isinstance(module, layer)]
    assert quantizable.weights == sum(module.in_features * module.out_features for module in layers)
    assert bool(quantizable.weights) is (4 in FAMILIES[family].bits)


def test_family_adapter_loads_and_merges(folder, trained, tmp_path):
    adapter = write_weights(trained, make_tokenizer(), make_record(folder), tmp_path)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), adapter)
    expected = logits_of(trained.wrapped)
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-3, atol=1e-3)
    with model.disable_adapter():
        assert float((logits_of(model) - expected).norm()) > 0.01 * float(expected.norm())
    torch.testing.assert_close(logits_of(model.merge_and_unload(safe_merge=True)), expected, rtol=1e-3, atol=1e-3)
