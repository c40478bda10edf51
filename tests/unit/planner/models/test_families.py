"""Shapes against the real classes: transformers builds them without memory, bitsandbytes' replacement included."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_api.v1alpha1 import LoraSpec
from qlora_planner.memory.adapter import find_trainable
from qlora_planner.models.families import FAMILIES, read_shape
from qlora_planner.models.shapes import ModelShape, UnknownModelError
from qlora_trainer.model.adapter import lora_config
from tests.make import make_spec
from tests.unit.planner.public import NAMES, build, load_config
from tests.unit.trainer.families import FAMILIES as TINY
from tests.unit.trainer.families import family_config

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def weights_by_module(model: Any) -> dict[str, int]:
    return {
        name: sum(parameter.numel() for parameter in module.parameters(recurse=False))
        for name, module in model.named_modules()
        if any(True for _ in module.parameters(recurse=False))
    }


def adapted_by_peft(model: Any, targets: str | list[str]) -> int:
    lora = LoraSpec(rank=8, dropout=0, targets=(targets,) if isinstance(targets, str) else tuple(targets))
    peft = get_peft_model(model, lora_config(lora, model))
    return sum(parameter.numel() for parameter in peft.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("name", NAMES)
def test_modules_match_public_model(name: str) -> None:
    config = load_config(name)
    shape, model = read_shape(config), build(config)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert dict(shape.named_modules()) == weights_by_module(model)


# peft prepares Mixtral's experts for adapters that all-linear then does not ask for.
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("name", NAMES)
def test_all_linear_matches_peft(name: str) -> None:
    config = load_config(name)
    ours = find_trainable(read_shape(config), make_spec(lora={"rank": 8, "dropout": 0, "targets": ["all-linear"]}))
    assert ours.adapter == adapted_by_peft(build(config), "all-linear")


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"gemma3"}))
def test_empty_config_has_class_defaults(family: str) -> None:
    config = AutoConfig.for_model(family)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert read_shape({"model_type": family}).parameters == sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize("family", sorted(TINY))
def test_config_saved_by_transformers_is_read(family: str, tmp_path: Path) -> None:
    config = family_config(family)
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = read_shape(json.loads((tmp_path / "config.json").read_text()))
    assert shape.parameters == sum(weight.numel() for weight in model.parameters())
    assert {name.rpartition(".")[2] for name, _ in shape.named_linears()} == TINY[family].linears


def describe(shape: ModelShape) -> tuple[object, ...]:
    attention, mlp = shape.attention, shape.mlp
    return (
        (shape.layers, shape.hidden, shape.vocabulary, shape.tied),
        (attention.heads, attention.kv_heads, attention.head_dim, attention.rotary),
        (attention.window, attention.sliding_layers, attention.softcapped, attention.qk_norm),
        (mlp.intermediate, mlp.gated, mlp.activation, mlp.experts, mlp.experts_per_token),
        (shape.norm, shape.parallel, shape.plain_head),
    )


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        (
            "llama-3.2-3b",
            ((28, 3072, 128_256, True), (24, 8, 128, 128), (None, 0, False, False), (8192, True, "silu", 1, 1)),
        ),
        (
            "gemma-2-9b",
            (
                (42, 3584, 256_000, True),
                (16, 8, 256, 256),
                (4096, 21, True, False),
                (14_336, True, "gelu_pytorch_tanh", 1, 1),
            ),
        ),
        (
            "gemma-3-1b",
            (
                (26, 1152, 262_144, True),
                (4, 1, 256, 256),
                (512, 22, False, True),
                (6912, True, "gelu_pytorch_tanh", 1, 1),
            ),
        ),
        (
            "mixtral-8x7b-v0.1",
            ((32, 4096, 32_000, False), (32, 8, 128, 128), (None, 0, False, False), (14_336, True, "silu", 8, 2)),
        ),
        (
            "phi-2",
            ((32, 2560, 51_200, False), (32, 32, 80, 32), (None, 0, False, False), (10_240, False, "gelu_new", 1, 1)),
        ),
        (
            "falcon-7b",
            ((32, 4544, 65_024, True), (71, 1, 64, 64), (None, 0, False, False), (18_176, False, "gelu", 1, 1)),
        ),
    ],
)
def test_forward_pass_properties(name: str, sizes: tuple[object, ...]) -> None:
    assert describe(read_shape(load_config(name)))[:4] == sizes


def test_sliding_layers() -> None:
    kinds = {name: describe(read_shape(load_config(name)))[4] for name in NAMES}
    assert kinds["llama-3.1-8b"] == ("rms", False, True)
    assert kinds["gemma-2-9b"] == ("rms", False, False)
    assert kinds["phi-2"] == kinds["pythia-1.4b"] == kinds["falcon-40b"] == ("layer", True, True)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"model_type": "mamba"}, "type 'mamba' is not known (known types: falcon, gemma,"),
        ({}, "type 'None' is not known"),
        ({"model_type": "llama", "hidden_size": "wide"}, "config.json: hidden_size: Input should be a valid integer"),
        ({"model_type": "llama", "num_hidden_layers": 0}, "config.json: num_hidden_layers: Input should be greater"),
    ],
)
def test_unknown_model_names_explicit_fields(config: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UnknownModelError, match=r"spec\.resources.gpusPerNode") as caught:
        read_shape(config)
    assert sentence in str(caught.value)
