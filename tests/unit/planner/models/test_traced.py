"""Shapes of architectures that no code describes: what prepare records of the class that transformers builds."""

import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.quantizers.base import HfQuantizer

from qlora_api.model_config import MAX_CONFIG, SIZED_TYPES, TRACED_VERSION
from qlora_api.v1alpha1 import QuantizationSpec
from qlora_planner.memory.adapter import find_trainable
from qlora_planner.memory.weights import HALF, base_bytes
from qlora_planner.models.families import FAMILIES, read_recorded_shape, read_shape
from qlora_planner.models.shapes import UnknownModelError
from qlora_planner.models.traced import TracedShape, read_traced
from qlora_trainer.model.base_model import quantization_config
from qlora_trainer.model.module_sizes import describe_size, trace_modules
from tests.make import make_spec
from tests.unit.planner.models.test_families import adapted_by_peft, weights_by_module
from tests.unit.planner.public import NAMES, build, load_config

ALL = {"rank": 8, "dropout": 0, "targets": ["all-linear"]}
BITS = [QuantizationSpec(), QuantizationSpec(bits=8), QuantizationSpec(bits=16)]
OTHERS: Mapping[str, Mapping[str, Any]] = {
    "gpt2": {},  # transposed matrices
    "opt": {},  # a tied output layer
    "camembert": {},  # one that comes before the embedding
    "gemma3n_text": {"num_hidden_layers": 10, "num_kv_shared_layers": 5, "layer_types": None},  # a second embedding
    "qwen3_5_text": {"num_hidden_layers": 8},  # two kinds of layers
    "qwen2_moe": {"num_hidden_layers": 4},  # stacked experts
    "qwen3_moe": {"num_hidden_layers": 4},  # those that PEFT adapts
    "deepseek_v3": {"num_hidden_layers": 5},  # those whose names linear layers have too
    "gpt_oss": {"num_hidden_layers": 4},
    "mamba": {},
    "jamba": {"num_hidden_layers": 8},
    "zamba2": {},  # layers that share their weights
}
"""Architectures without a shape of their own, with settings that make a model of fewer layers."""
SHARING = {"camembert", "zamba2"}
"""A bias, or weights of layers, belong to several modules, and count with the first."""
REFUSED_BY_PEFT = {"mamba"}
"""all-linear would adapt a projection that a kernel of Mamba reads past its module."""


def build_default(model_type: str, dtype: torch.dtype | None = None, **settings: Any) -> Any:
    """Build an architecture with the widths of its default configuration, without weights."""
    with torch.device("meta"):
        config = AutoConfig.for_model(model_type, **OTHERS.get(model_type, {}) | settings)
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def traced(model_type: str, model: Any) -> TracedShape:
    return read_traced({"model_type": model_type, "traced": next(iter(trace_modules(model)))})


def footprint(model: Any) -> int:
    """Bytes of the weights after bitsandbytes has packed them: two of 4 bits in a byte."""
    packed = {id(each.weight): 0.5 for each in model.modules() if isinstance(each, Linear4bit)}
    packed |= {id(each.weight): 1 for each in model.modules() if isinstance(each, Linear8bitLt)}
    return sum(int(weight.numel() * packed.get(id(weight), HALF)) for weight in model.parameters())


def test_sized_types_are_the_families_of_the_planner() -> None:
    assert set(FAMILIES) == SIZED_TYPES


@pytest.mark.parametrize("name", NAMES)
def test_traced_public_model_equals_its_described_shape(name: str) -> None:
    config = load_config(name)
    ours, described = traced(config["model_type"], build(config)), read_shape(config)
    assert dict(ours.named_modules()) == dict(described.named_modules())
    assert dict(ours.named_linears()) == dict(described.named_linears())
    assert [base_bytes(ours, bits, HALF) for bits in BITS] == [base_bytes(described, bits, HALF) for bits in BITS]
    spec = make_spec(lora=ALL)
    assert sorted(find_trainable(ours, spec).tensors) == sorted(find_trainable(described, spec).tensors)


@pytest.mark.parametrize("model_type", OTHERS)
def test_traced_modules_and_bytes_match_the_class_of_transformers(model_type: str) -> None:
    model = build_default(model_type, torch.bfloat16)
    shape, sizes = read_recorded_shape(describe_size(model, {"model_type": model_type})), weights_by_module(model)
    assert shape.parameters == sum(weight.numel() for weight in model.parameters())
    if model_type not in SHARING:
        assert dict(shape.named_modules()) == sizes
    skipped = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    replaced = replace_with_bnb_linear(model, skipped, quantization_config(BITS[0], torch.bfloat16))
    assert base_bytes(shape, BITS[0], HALF).weights - HALF * shape.kept_in_fp32 == footprint(replaced)


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys", "ignore:target_parameters=")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated", "ignore:fan_in_fan_out is set to False")
@pytest.mark.parametrize("model_type", sorted({*OTHERS} - REFUSED_BY_PEFT))
def test_traced_all_linear_matches_peft(model_type: str) -> None:
    model = build_default(model_type)
    ours = find_trainable(traced(model_type, model), make_spec(lora=ALL))
    assert ours.adapter == adapted_by_peft(model, "all-linear")


def test_targets_that_also_name_stacked_experts_are_of_unknown_size() -> None:
    shape = traced("deepseek_v3", build_default("deepseek_v3"))
    assert find_trainable(shape, make_spec(lora={"rank": 8, "targets": ["o_proj"]})).adapter > 0
    with pytest.raises(
        UnknownModelError, match=r"spec\.lora\.targets: down_proj names the stacked experts of deepseek"
    ):
        find_trainable(shape, make_spec(lora={"rank": 8, "dropout": 0, "targets": ["o_proj", "down_proj"]}))


def test_router_that_transformers_keeps_in_fp32_takes_twice_the_bytes() -> None:
    shape = traced("flint", build_default("flint"))
    assert shape.kept_in_fp32 > 1_000_000
    plain = (shape.parameters - shape.quantizable) * HALF + shape.quantizable // 2
    assert base_bytes(shape, QuantizationSpec(), HALF).weights == plain + shape.kept_in_fp32 * 2


def test_model_with_many_kinds_of_layers_is_recorded_without_names_that_do_not_fit() -> None:
    model = build_default("phi4_multimodal")
    first, second = trace_modules(model)
    assert len(json.dumps(first)) > MAX_CONFIG
    recorded = describe_size(model, {"model_type": "phi4_multimodal"})
    assert 1000 < len(recorded) <= MAX_CONFIG
    shape = read_recorded_shape(recorded)
    assert shape == read_traced({"model_type": "phi4_multimodal", "traced": second})
    assert shape.parameters == sum(weight.numel() for weight in model.parameters())
    with pytest.raises(UnknownModelError, match=r"spec\.lora\.modulesToSave: .* no module norm of a known size"):
        find_trainable(shape, make_spec(lora={"rank": 8, "targets": ["o_proj"], "modulesToSave": ["norm"]}))


def test_config_of_a_described_family_is_recorded_as_before() -> None:
    assert "traced" not in describe_size(build(load_config("pythia-1.4b")), load_config("pythia-1.4b"))


VALID = {
    "version": TRACED_VERSION,
    "embedding": "wte",
    "head": "lm_head",
    "modules": ":wte=50,lm_head=10x5;h.0-1:up=20x5qa,norm=5",
}


def test_recorded_sizes_are_read() -> None:
    shape = read_traced({"model_type": "new", "traced": VALID | {"of_a_later_release": 1}})
    assert (shape.family, shape.parameters, shape.quantizable) == ("new", 50 + 50 + 2 * (100 + 5), 200)


@pytest.mark.parametrize(
    ("traced", "cause"),
    [
        pytest.param(VALID | {"version": 2}, "have version 2, and this operator reads 1", id="later-version"),
        pytest.param(VALID | {"version": True}, "have version True", id="boolean-version"),
        pytest.param(VALID | {"version": "v" * 999}, "have version vvv", id="long-version"),
        pytest.param([], "have version None", id="list"),
        pytest.param(None, "have version None", id="null"),
        pytest.param("x", "have version None", id="text"),
        pytest.param({"version": 1}, "cannot be read: embedding: Field required", id="empty"),
        pytest.param(VALID | {"modules": 7}, "modules: Input should be a valid string", id="number"),
        pytest.param(VALID | {"modules": "%"}, "it has a group '%'", id="no-table"),
        pytest.param(VALID | {"experts": "%"}, "it has a group '%'", id="no-table-of-experts"),
        pytest.param(VALID | {"head": "wpe"}, "it has no module 'wpe' outside of layers", id="no-head"),
        pytest.param(VALID | {"head": "wte"}, "'wte' no output layer", id="head-without-matrix"),
        pytest.param(VALID | {"fp32": -1}, "fp32: Input should be greater", id="negative"),
        pytest.param(VALID | {"fp32": 10**9}, "a model of 310 weights cannot be", id="more-fp32-than-weights"),
        pytest.param(
            VALID | {"modules": ":wte=50,lm_head=99999999999x999"}, "weights cannot be", id="too-many-weights"
        ),
    ],
)
def test_recorded_sizes_that_cannot_be_read_are_an_unknown_model(traced: object, cause: str) -> None:
    with pytest.raises(UnknownModelError, match=r"set spec\.resources\.gpusPerNode") as caught:
        read_recorded_shape(json.dumps({"model_type": "new", "traced": traced}))
    assert cause in str(caught.value)
    assert len(str(caught.value)) < 400
