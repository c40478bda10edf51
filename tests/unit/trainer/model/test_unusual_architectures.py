"""What architectures outside the tested families do otherwise: routers, indexers, leaking attention, varying layers."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_api.v1alpha1 import LoraSpec
from qlora_trainer.errors import RunError
from qlora_trainer.model.adapter import lora_config, resolve_adapter
from qlora_trainer.model.architecture import build_empty, linear_modules
from qlora_trainer.model.attention import attention_facts
from qlora_trainer.model.base_model import packing_is_exact
from qlora_trainer.model.shrunk_model import shrink
from qlora_trainer.model.unpacked_attention import unpacked_attention
from tests.unit.trainer.tiny import SMALL

# PEFT names weights of experts that a model of few layers does not have.
pytestmark = pytest.mark.filterwarnings("ignore:The following .*_pattern keys", "ignore:target_parameters=")

ALL_LINEAR = LoraSpec(rank=4, dropout=0.0, targets=("all-linear",))
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 64, "head_dim": 16}
SPARSE_ATTENTION = SMALL | {"num_key_value_heads": 4, "index_n_heads": 2, "q_lora_rank": 32, "kv_lora_rank": 16}


def make(family: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings)).eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("xglm", {"vocab_size": 384, "d_model": 32, "num_layers": 2, "attention_heads": 2, "ffn_dim": 64}),
        ("openai-gpt", {"vocab_size": 384, "n_embd": 32, "n_layer": 2, "n_head": 2}),
    ],
)
def test_packing_is_off_where_nearly_uniform_attention_leaks(family, settings):
    """The logits differ by less than bf16 rounds, and training by 0.002 nats per token and more."""
    assert not packing_is_exact(make(family, **settings))


@pytest.mark.parametrize(
    ("family", "settings", "excluded"),
    [
        ("llama4_text", SMALL | EXPERTS | {"interleave_moe_layer_step": 1}, "router"),
        ("phimoe", SMALL | EXPERTS | {"num_experts_per_tok": 2}, "router"),
        ("deepseek_v32", SPARSE_ATTENTION, "indexer"),
    ],
)
def test_all_linear_leaves_out_modules_that_an_adapter_breaks(family, settings, excluded):
    """A router returns a tuple, and no gradient flows through an indexer's topk: both ended runs in step 1."""
    model = make(family, **settings)
    assert not [name for name in linear_modules(model) if excluded in name]
    assert [name for name in lora_config(ALL_LINEAR, model).exclude_modules if excluded in name]
    assert not [name for name in resolve_adapter(model, ALL_LINEAR)["modules"] if excluded in name.split(".")]


def test_model_without_attention_heads_has_attention_facts():
    assert attention_facts(AutoConfig.for_model("rwkv")).head_size == 0


def test_attention_facts_of_layers_that_differ_are_those_of_the_largest():
    config = AutoConfig.for_model("llama", **SMALL | {"head_dim": 16})
    config.per_layer_config = {1: {"head_dim": 32}}
    assert attention_facts(config).head_size == 32


@pytest.mark.parametrize("heads", [1, 4])
def test_mask_of_numbers_is_unpacked_for_each_head(heads):
    """Doge adds a mask of numbers to the scores, and each head has one of its own."""
    torch.manual_seed(0)
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3]])
    rows = (positions[0] == 0).cumsum(0)
    allowed = (rows[:, None] == rows[None, :]) & torch.ones(9, 9).tril().bool()
    mask = torch.where(allowed, torch.randn(1, heads, 9, 9), torch.finfo(torch.float32).min)
    query, key, value = torch.randn(3, 1, 4, 9, 8)
    module = torch.nn.Module()
    module.is_causal = True
    found, _ = unpacked_attention(module, query, key, value, mask, position_ids=positions)
    expected, _ = unpacked_attention(module, query, key, value, mask)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("family", "kinds", "layers"),
    [
        # It computes the kinds of its layers from one period of them.
        ("recurrent_gemma", "layers_block_type", 3),
        ("zamba", "layers_block_type", 3),
    ],
)
def test_copy_has_a_layer_of_each_kind_of_a_computed_list(family, kinds, layers):
    shrunk = shrink(AutoConfig.for_model(family), 8)
    assert shrunk.num_hidden_layers == layers
    assert set(getattr(shrunk, kinds)) == set(getattr(AutoConfig.for_model(family), kinds))


def test_copy_has_two_layers_of_each_kind_that_share_weights():
    """Zamba's hybrid layers share one block: the class cannot be built with a single one."""
    kinds = shrink(AutoConfig.for_model("zamba"), 8, repeats=2).layers_block_type
    assert kinds.count("hybrid") == 2


def test_copy_of_layers_that_differ_keeps_what_its_layers_have():
    config = AutoConfig.for_model("llama", **SMALL | {"head_dim": 16, "num_hidden_layers": 6})
    config.per_layer_config = {1: {"head_dim": 32}, 4: {"head_dim": 64}}
    shrunk = shrink(config, 1)
    assert shrunk.num_hidden_layers == 2
    assert [layer.head_dim for layer in shrunk.per_layer_config] == [16, 32]


def test_type_without_a_causal_class_is_named(tmp_path):
    AutoConfig.for_model("llava").save_pretrained(tmp_path)
    with pytest.raises(RunError, match=r"spec\.model\.uri: .* no causal language model of the type 'llava'"):
        build_empty(tmp_path)
