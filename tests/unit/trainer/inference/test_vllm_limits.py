"""vLLM's LoRA limits, one by one."""

from typing import Any

import pytest

from qlora_api.vllm import max_lora_rank_for
from qlora_trainer.inference.vllm_limits import vllm_problems

LAYER = "base_model.model.model.layers.0.self_attn.q_proj"


def shapes(rank: int = 16, layer: str = LAYER) -> dict[str, tuple[int, ...]]:
    return {f"{layer}.lora_A.weight": (rank, 64), f"{layer}.lora_B.weight": (32, rank)}


@pytest.mark.parametrize(
    ("config", "tensors", "problem"),
    [
        pytest.param({}, shapes(), None, id="fine"),
        pytest.param({"use_rslora": True}, shapes(), None, id="rslora"),
        pytest.param({"r": 5}, shapes(5), None, id="odd-rank"),
        pytest.param({"use_dora": True}, shapes(), "DoRA", id="dora"),
        pytest.param({"modules_to_save": ["lm_head"]}, shapes(), "replaces modules", id="modules-to-save"),
        pytest.param({"bias": "all"}, shapes(), "biases", id="bias"),
        pytest.param({"lora_bias": True}, shapes(), "biases", id="lora-bias"),
        pytest.param({"rank_pattern": {"q_proj": 4}}, shapes(), "differ in rank", id="rank-pattern"),
        pytest.param({"r": 1024}, shapes(1024), "rank is 1024", id="rank"),
        pytest.param({}, shapes(8), "do not have the rank 16", id="wrong-rank"),
        pytest.param({}, shapes(layer="model.layers.0.q_proj"), "2 tensors are not LoRA weights", id="prefix"),
        pytest.param(
            {}, shapes() | {f"{LAYER}.lora_magnitude_vector": (64,)}, "1 tensors are not LoRA weights", id="vector"
        ),
        pytest.param({}, shapes(layer="base_model.model.odd_proj"), "adapts odd_proj", id="module"),
    ],
)
def test_each_limit_is_reported(config: dict[str, Any], tensors: dict[str, tuple[int, ...]], problem: str | None):
    problems = vllm_problems({"r": 16, "bias": "none"} | config, tensors)
    assert len(problems) == (problem is not None)
    assert problem is None or problem in problems[0]


@pytest.mark.parametrize(("rank", "flag"), [(1, 8), (8, 8), (9, 16), (64, 64), (257, 320), (512, 512), (513, None)])
def test_max_lora_rank_is_the_lowest_that_vllm_accepts(rank, flag):
    assert max_lora_rank_for(rank) == flag
