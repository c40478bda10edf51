"""What a pass is said to take grows as it must; benchmarks/memory holds it to what torch takes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_planner.memory.activations import estimate_activations
from qlora_planner.memory.forward_config import FP32, HALF, BatchShape, ForwardConfig
from qlora_planner.models.families import read_shape
from qlora_planner.models.shapes import numbered_layers

CONFIGS = Path(__file__).parents[1] / "configs"
LLAMA = read_shape(json.loads((CONFIGS / "llama-3.2-3b.json").read_text()))
ALL = {linear.path: 16 for linear in LLAMA.decoder.linears}
BATCH = BatchShape(rows=4, longest=512, tokens=2048, labels=1024, packing=False)
DEFAULT_CONFIG = ForwardConfig(BATCH, ranks={"self_attn.q_proj": 16, "self_attn.v_proj": 16})

sizes = st.integers(min_value=1, max_value=4096)


def make_batch_shape(rows: int, longest: int, *, packing: bool = False) -> BatchShape:
    return BatchShape(rows, longest, tokens=rows * longest, labels=rows * longest, packing=packing)


def peak(setting: ForwardConfig, layers: int = 28) -> int:
    shape = replace(LLAMA, decoder=replace(LLAMA.decoder, layers=numbered_layers("model.layers", layers)))
    return estimate_activations(shape, setting).peak


@given(rows=st.integers(1, 16), longest=sizes, more=sizes, checkpointing=st.booleans(), packing=st.booleans())
def test_activations_grow_with_row_length(rows, longest, more, checkpointing, packing):
    setting = replace(DEFAULT_CONFIG, checkpointing=checkpointing)
    short, long = (
        replace(setting, batch=make_batch_shape(rows, each, packing=packing)) for each in (longest, longest + more)
    )
    assert peak(short) < peak(long)


@given(rows=st.integers(1, 16), more=st.integers(1, 16), longest=sizes, packing=st.booleans())
def test_activations_grow_with_rows(rows, more, longest, packing):
    few, many = (
        replace(DEFAULT_CONFIG, batch=make_batch_shape(each, longest, packing=packing)) for each in (rows, rows + more)
    )
    assert peak(few) < peak(many)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_extrapolated_layers_match_simulated_layers(device, checkpointing):
    setting = replace(DEFAULT_CONFIG, device=device, checkpointing=checkpointing)
    three, four, five = (peak(setting, layers) for layers in (3, 4, 5))
    assert five - four == four - three
    if checkpointing:  # its input, the 16-bit copies of its adapters that autocast holds, and on a CPU a random state
        adapters = 16 * (LLAMA.hidden + 3072 + LLAMA.hidden + 1024)
        state = 5056 if device == "cpu" else 0
        assert four - three == BATCH.tokens * LLAMA.hidden * HALF + adapters * HALF + state


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("fp32", {"compute": FP32}),
        ("every linear layer", {"ranks": ALL}),
        ("dropout", {"ranks": ALL, "dropout": True}),
        ("DoRA", {"dora": True}),
        ("eager attention", {"attention": "eager"}),
        ("a CPU, where adapters get fp32", {"device": "cpu"}),
        ("all weights", {"full_finetune": True, "bits": 16, "ranks": {}}),
    ],
)
def test_option_increases_activations(name, change):
    del name
    assert peak(replace(DEFAULT_CONFIG, **change)) > peak(DEFAULT_CONFIG)


@pytest.mark.parametrize("change", [{"checkpointing": True}, {"attention": "flash_attention_2"}])
def test_option_decreases_activations(change):
    assert peak(replace(DEFAULT_CONFIG, **change)) < peak(DEFAULT_CONFIG)


def test_estimate_of_largest_checkpointed_model_is_fast():
    """Layers are played, not multiplied out: 80 of them cost what 3 do."""
    shape = read_shape(json.loads((CONFIGS / "llama-2-70b.json").read_text()))
    kept = estimate_activations(shape, replace(DEFAULT_CONFIG, checkpointing=True)).saved
    assert kept >= 80 * BATCH.tokens * shape.hidden * HALF


@pytest.mark.parametrize(
    ("activation", "saved"),
    [("gelu", 1), ("gelu_new", 4), ("gelu_fast", 7), ("quick_gelu", 2)],
)
def test_activation_computed_in_python_saves_every_factor(activation, saved):
    """GPT-NeoX-20B has gelu_fast; its inputs are fp32 after a layer norm under CUDA's autocast."""
    config = json.loads((CONFIGS / "gpt-neox-20b.json").read_text())
    setting = replace(DEFAULT_CONFIG, ranks={"attention.query_key_value": 16})
    of_one, of_activation = (
        estimate_activations(read_shape(config | {"hidden_act": name}), setting).saved for name in ("gelu", activation)
    )
    mlp = config["num_hidden_layers"] * BATCH.tokens * config["intermediate_size"] * FP32
    assert of_activation - of_one == pytest.approx((saved - 1) * mlp, rel=0.03)  # the first layer saves less
