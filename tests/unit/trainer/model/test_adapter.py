"""Adapters: shape, initialization, modulesToSave, and loading on the original base."""

import dataclasses
import json

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qlora_api.reasons import Reason
from qlora_api.v1alpha1 import LoraSpec, QuantizationSpec
from qlora_trainer.errors import RunError
from qlora_trainer.evaluation.evaluator import compute_metrics
from qlora_trainer.model.architecture import load_architecture
from qlora_trainer.model.base_model import TrainableModel, attach_lora, load_base
from qlora_trainer.model.loftq import low_rank_factors
from qlora_trainer.model.target_modules import check_modules, expand_pattern
from qlora_trainer.publishing.publish import write_weights
from tests.unit.trainer.tiny import make_model, make_spec, make_tokenizer, write_model
from tests.unit.trainer.tuned import NF4, SETTINGS, make_record, make_test_loop, run_steps, token_rows, weights_of

SIXTEEN_BITS = {"method": "lora", "quantization": {"bits": 16}}
IDS = torch.tensor([[3, 141, 59, 26, 5, 35]])


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    write_model(path, tie_word_embeddings=request.param)
    return path


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    path = tmp_path_factory.mktemp("tied")
    write_model(path)
    return path


def trainable_on(folder, lora: LoraSpec, bits: int = 16, dtype: torch.dtype = torch.float32) -> TrainableModel:
    base = load_base(folder, QuantizationSpec(bits=bits), dtype, "sdpa", "cpu")
    return attach_lora(base, lora, 1, dataclasses.replace(SETTINGS, dtype=dtype))


def original(folder):
    """Load the base as it is on disk."""
    return load_base(folder, QuantizationSpec(bits=16), torch.float32, "sdpa", "cpu")


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


def reload(trainable: TrainableModel, folder, target, dtype: torch.dtype = torch.float32):
    """Publish the adapter, and load it like a user: on the base as it is on disk."""
    adapter = write_weights(trainable, make_tokenizer(), make_record(folder), target)
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), adapter)


def test_rank_and_alpha_patterns_set_rank_and_scale_per_module(tied, tmp_path):
    lora = LoraSpec(
        rank=4,
        alpha=8,
        dropout=0,
        targets=("all-linear",),
        rank_pattern={"q_proj": 6, "layers.1.self_attn.q_proj": 2},
        alpha_pattern={"v_proj": 32},
    )
    trainable = trainable_on(tied, lora)
    first, second = (layer.self_attn for layer in trainable.model.model.layers)
    assert (first.q_proj.r["default"], second.q_proj.r["default"], first.k_proj.r["default"]) == (6, 2, 4)
    assert (first.v_proj.scaling["default"], first.k_proj.scaling["default"]) == (8.0, 2.0)
    run_steps(make_test_loop(trainable, token_rows(8)))
    torch.testing.assert_close(logits_of(reload(trainable, tied, tmp_path)), logits_of(trainable.wrapped))


def test_rank_pattern_longest_matching_name_wins():
    modules = ["layers.0.q_proj", "layers.1.q_proj", "layers.11.q_proj"]
    pattern = {"layers.1.q_proj": 2, "q_proj": 6}
    assert expand_pattern(modules, pattern) == {"layers.0.q_proj": 6, "layers.1.q_proj": 2, "layers.11.q_proj": 6}


@pytest.mark.parametrize(
    ("lora", "blocks", "message"),
    [
        ({"targets": ["q_prj"]}, {}, "spec.lora.targets: LlamaForCausalLM has no linear module q_prj to adapt"),
        ({"targets": ["lm_head"]}, {}, "spec.lora.targets: LlamaForCausalLM has no linear module lm_head"),
        ({"targets": ["mlp.q_proj"]}, {}, "spec.lora.targets: LlamaForCausalLM has no linear module mlp.q_proj"),
        ({"rankPattern": {"k_proj": 2}}, {}, "spec.lora.rankPattern: no module with an adapter is named k_proj"),
        ({"alphaPattern": {"layers.9.q_proj": 2}}, {}, "spec.lora.alphaPattern: no module with an adapter is named"),
        ({"modulesToSave": ["wte"]}, {}, "spec.lora.modulesToSave: LlamaForCausalLM has no module wte with weights"),
        ({"modulesToSave": ["mlp"]}, {}, "spec.lora.modulesToSave: LlamaForCausalLM has no module mlp with weights"),
        ({"modulesToSave": ["v_proj"]}, {}, "model.layers.0.self_attn.v_proj already has an adapter"),
        ({"modulesToSave": ["up_proj"]}, {}, "model.layers.0.mlp.up_proj is quantized and cannot be in modules"),
        ({"init": "loftq", "rank": 65}, {}, "loftq needs rank 64 or less for model.layers.0.self_attn.q_proj"),
        ({"init": "pissa", "rankPattern": {"v_proj": 33}}, SIXTEEN_BITS, "pissa needs rank 32 or less for"),
    ],
)
def test_unknown_module_names_are_refused(tied, lora, blocks, message):
    spec = make_spec("file:///m", "file:///d", "file:///o", lora=lora, **blocks)
    with pytest.raises(RunError, match=message) as caught:
        check_modules(load_architecture(tied), spec)
    assert caught.value.reason == Reason.MODEL_UNSUPPORTED


@pytest.mark.parametrize(
    ("lora", "blocks"),
    [
        ({"targets": ["all-linear"], "rankPattern": {"down_proj": 2}, "modulesToSave": ["embed_tokens", "norm"]}, {}),
        ({"targets": ["layers.1.mlp.up_proj"], "modulesToSave": ["q_proj"]}, SIXTEEN_BITS),
    ],
)
def test_module_names_of_the_model_are_accepted(tied, lora, blocks):
    check_modules(load_architecture(tied), make_spec("file:///m", "file:///d", "file:///o", lora=lora, **blocks))


def test_tied_weight_unknown_to_peft_is_refused(tied):
    architecture = dataclasses.replace(
        load_architecture(tied), modules_with_weights=frozenset({"wte", "head"}), tied=frozenset({"wte", "head"})
    )
    spec = make_spec("file:///m", "file:///d", "file:///o", lora={"modulesToSave": ["wte"]})
    with pytest.raises(RunError, match="would train a copy; remove wte"):
        check_modules(architecture, spec)


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("names", [("embed_tokens",), ("lm_head",), ("embed_tokens", "lm_head", "norm")])
def test_modules_to_save_are_trained_in_fp32_and_come_back(folder, tmp_path, bits, names):
    trainable = trainable_on(folder, LoraSpec(rank=2, dropout=0, modules_to_save=names), bits, torch.bfloat16)
    assert {weight.dtype for weight in trainable.parameters()} == {torch.float32}
    output, embedding = trainable.model.get_output_embeddings(), trainable.model.get_input_embeddings()
    assert (output.weight is embedding.weight) == trainable.model.config.tie_word_embeddings
    before = weights_of(trainable)
    run_steps(make_test_loop(trainable, token_rows(8)))
    assert not any(torch.equal(one, other) for one, other in zip(before, weights_of(trainable), strict=True))
    if bits == 16:
        with trainable.autocast():
            found, wanted = logits_of(reload(trainable, folder, tmp_path)), logits_of(trainable.wrapped).float()
        assert float((found - wanted).norm() / wanted.norm()) < 0.05


def test_modules_to_save_norm_matches_only_the_final_norm(tied):
    trainable = trainable_on(tied, LoraSpec(rank=2, modules_to_save=("norm",)))
    names = [name for name, _ in trainable.named_parameters() if "lora_" not in name]
    assert names == ["base_model.model.model.norm.modules_to_save.default.weight"]


@pytest.mark.parametrize("init", ["default", "gaussian", "pissa"])
def test_new_adapter_leaves_outputs_unchanged(tied, init):
    wanted = logits_of(original(tied))
    trainable = trainable_on(tied, LoraSpec(rank=4, init=init, targets=("all-linear",)))
    torch.testing.assert_close(logits_of(trainable.wrapped), wanted, rtol=1e-3, atol=1e-3)
    lora_a = trainable.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight
    assert float(lora_a.detach().norm()) > 0


def test_pissa_is_published_for_the_original_base(tied, tmp_path):
    lora = LoraSpec(rank=4, alpha=12, dropout=0, init="pissa", targets=("all-linear",), rank_pattern={"q_proj": 2})
    trainable, rows = trainable_on(tied, lora), token_rows(8)
    with trainable.evaluating(adapter=False):
        before = compute_metrics(trainable, rows, 4, packing=True)
    run_steps(make_test_loop(trainable, rows))
    with trainable.evaluating(adapter=False):
        assert compute_metrics(trainable, rows, 4, packing=True) == before
    model = reload(trainable, tied, tmp_path)
    torch.testing.assert_close(logits_of(model), logits_of(trainable.wrapped), rtol=1e-3, atol=1e-3)
    assert model.peft_config["default"].init_lora_weights is True
    attention = model.get_base_model().model.layers[0].self_attn
    assert (attention.q_proj.r["default"], attention.v_proj.r["default"]) == (4, 8)
    with model.disable_adapter():
        torch.testing.assert_close(logits_of(model), logits_of(original(tied)))


@pytest.mark.parametrize("alpha", [8, 32])
@torch.no_grad()
def test_loftq_init_reduces_quantization_error(tied, alpha):
    wanted = logits_of(original(tied))
    trainable = trainable_on(tied, LoraSpec(rank=8, alpha=alpha, init="loftq", targets=("all-linear",)), bits=4)
    with trainable.evaluating(adapter=False):
        without = logits_of(trainable.wrapped)
    distances = [float((logits - wanted).norm()) for logits in (without, logits_of(trainable.wrapped))]
    assert distances[1] < 0.9 * distances[0]
    layer = trainable.model.model.layers[1].mlp.down_proj
    error = (
        original(tied).model.layers[1].mlp.down_proj.weight
        - dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    )
    left, values, right = torch.linalg.svd(error)
    best = left[:, :8] @ torch.diag(values[:8]) @ right[:8]
    assert float((error - layer.get_delta_weight("default")).norm()) < 1.01 * float((error - best).norm())


def test_loftq_with_unknown_weight_name_is_refused(tied, tmp_path):
    for file in tied.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    base = load_base(tied, NF4, torch.float32, "sdpa", "cpu")
    weights = {name: weight for name, weight in load_file(tied / "model.safetensors").items() if "down" not in name}
    make_model().save_pretrained(tmp_path, state_dict=weights)
    base.name_or_path = str(tmp_path)
    with pytest.raises(RunError, match=r"store model.layers.0.mlp.down_proj.weight under another name"):
        attach_lora(base, LoraSpec(rank=2, init="loftq", targets=("down_proj",)), 1, SETTINGS)


def test_low_rank_factors_of_low_rank_matrix_are_exact():
    torch.manual_seed(0)
    matrix = torch.randn(20, 3) @ torch.randn(3, 30)
    up, down = low_rank_factors(matrix, 3)
    torch.testing.assert_close(up @ down, matrix, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "lora",
    [
        LoraSpec(rank=4, alpha=4, rslora=True, dropout=0),
        LoraSpec(rank=4, dora=True, dropout=0),
        LoraSpec(rank=4, dropout=0, init="gaussian"),
    ],
    ids=["rslora", "dora", "gaussian"],
)
def test_lora_variants_reload_as_trained(tied, tmp_path, lora):
    trainable = trainable_on(tied, lora)
    before = weights_of(trainable)
    run_steps(make_test_loop(trainable, token_rows(8)))
    assert not any(torch.equal(one, other) for one, other in zip(before, weights_of(trainable), strict=True))
    torch.testing.assert_close(logits_of(reload(trainable, tied, tmp_path)), logits_of(trainable.wrapped))
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (config["use_rslora"], config["use_dora"]) == (lora.rslora, lora.dora)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapter_on_8_bit_base_trains_on_cpu(tied, dtype):
    trainable, rows = trainable_on(tied, LoraSpec(rank=4, dropout=0, targets=("all-linear",)), 8, dtype), token_rows(8)
    settings = dataclasses.replace(SETTINGS, dtype=dtype)
    history = run_steps(make_test_loop(trainable, rows, runtime_settings=settings, steps=5))
    assert history[-1].loss < history[0].loss
    with trainable.evaluating(adapter=False):
        assert compute_metrics(trainable, rows, 4, packing=True).loss == pytest.approx(history[0].loss, rel=0.05)
