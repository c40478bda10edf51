"""Trainable weights against peft's own, on the real classes without memory."""

from collections import Counter
from typing import Any, Final

import pytest

from qlora_api.v1alpha1 import LoraSpec
from qlora_planner.memory.adapter import Trainable, find_trainable, ranks_of_layer
from qlora_planner.models.families import read_shape
from qlora_planner.models.shapes import MismatchError
from qlora_trainer.model.adapter import make_peft_model
from tests.make import make_spec
from tests.unit.planner.public import build, load_config

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

ATTENTION: Final = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL_SEVEN: Final = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


def count(name: str, **blocks: Any) -> Trainable:
    return find_trainable(read_shape(load_config(name)), make_spec(**blocks))


@pytest.mark.parametrize(
    ("rank", "targets", "expected"),
    [
        pytest.param(16, ["q_proj", "v_proj"], 4_587_520, id="r16-qv"),
        pytest.param(32, ATTENTION, 18_350_080, id="r32-attention"),
        pytest.param(256, ALL_SEVEN, 389_021_696, id="r256-all-seven"),
        pytest.param(256, ["all-linear"], 389_021_696, id="r256-all-linear"),
    ],
)
def test_adapter_parameters_of_llama_3b(rank: int, targets: list[str], expected: int) -> None:
    assert count("llama-3.2-3b", lora={"rank": rank, "targets": targets}).adapter == expected


@pytest.mark.parametrize(
    ("name", "lora"),
    [
        pytest.param("llama-3.2-3b", {}, id="defaults"),
        pytest.param("llama-2-70b", {"rank": 64, "targets": ["all-linear"]}, id="70b"),
        pytest.param("gemma-2b", {"targets": ["all-linear"], "dora": True}, id="dora"),
        pytest.param("gemma-3-4b", {"targets": ["q_proj", "v_proj"]}, id="a-tower-has-projections-too"),
        pytest.param("gemma-3-4b", {"targets": ["all-linear"], "rank": 8}, id="tower-all-linear"),
        pytest.param("phi-2", {"targets": ["q_proj", "dense", "fc1"], "dora": True}, id="phi"),
        pytest.param("pythia-1.4b", {"targets": ["query_key_value"]}, id="joined-projections"),
        pytest.param("falcon-7b", {"targets": ["all-linear"]}, id="falcon"),
        pytest.param("mixtral-8x7b-v0.1", {"targets": ["q_proj", "v_proj"], "rank": 8}, id="mixtral-attention"),
        pytest.param(
            "qwen3-0.6b",
            {"targets": ATTENTION, "rank_pattern": {"v_proj": 4, "layers.3.self_attn.v_proj": 64, "o_proj": 2}},
            id="ranks-of-single-modules",
        ),
        pytest.param("llama-3.1-8b", {"modules_to_save": ["embed_tokens", "lm_head"]}, id="full-untied"),
        pytest.param("llama-3.2-3b", {"modules_to_save": ["embed_tokens", "lm_head"]}, id="full-tied"),
        pytest.param("llama-3.2-3b", {"modules_to_save": ["lm_head", "norm"]}, id="full-head-of-tied-pair"),
        pytest.param("smollm2-135m", {"modules_to_save": ["embed_tokens", "input_layernorm"]}, id="full-norms"),
    ],
)
def test_trainable_weights_match_peft(name: str, lora: dict[str, Any]) -> None:
    config, spec = load_config(name), LoraSpec(**lora)
    base = build(config)
    base.requires_grad_(False)
    peft = make_peft_model(base, spec, seed=1)
    trained = Counter(weight.numel() for weight in peft.parameters() if weight.requires_grad)
    assert Counter(count(name, lora=spec.model_dump(by_alias=True, mode="json")).tensors) == trained


def test_method_full_trains_everything() -> None:
    full = count("smollm2-135m", method="full", quantization={"bits": 16})
    assert (full.parameters, full.adapter) == (134_515_008, 0)


def test_rank_of_layer_is_largest_of_blocks() -> None:
    shape = read_shape(load_config("llama-3.2-3b"))
    lora = LoraSpec(rank=8, targets=("q_proj", "v_proj"), rank_pattern={"layers.7.self_attn.v_proj": 64, "q_proj": 4})
    assert ranks_of_layer(shape, lora) == {"self_attn.q_proj": 4, "self_attn.v_proj": 64}


@pytest.mark.parametrize(
    ("name", "lora", "sentence"),
    [
        pytest.param(
            "phi-3-mini-4k",
            {"targets": ["q_proj", "o_proj"]},
            "spec.lora.targets: a model of type phi3 has no linear module q_proj to adapt; choose among down_proj, "
            "gate_up_proj, o_proj, qkv_proj, or write all-linear",
            id="joined-projections",
        ),
        pytest.param(
            "mixtral-8x7b-v0.1",
            {"targets": ["all-linear"], "dropout": 0.05},
            "spec.lora.targets: all-linear means the stacked experts of mixtral too, and peft has no dropout for "
            "those; name the projections of attention instead, or set spec.lora.dropout to 0",
            id="dropout-on-experts",
        ),
    ],
)
def test_unmatched_target_raises(name: str, lora: dict[str, Any], sentence: str) -> None:
    with pytest.raises(MismatchError) as caught:
        count(name, lora=lora)
    assert str(caught.value) == sentence
