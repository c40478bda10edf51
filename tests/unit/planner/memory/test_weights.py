"""Weights against transformers' own count with bitsandbytes' replacement, and real tensors of bitsandbytes."""

from typing import Any

import bitsandbytes
import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.quantizers.base import get_keys_to_not_convert

from qlora_api.v1alpha1 import LoraSpec, QuantizationSpec
from qlora_planner.memory.adapter import Trainable, find_trainable
from qlora_planner.memory.weights import FP32, HALF, BaseBytes, base_bytes, constant_bytes, optimizer_bytes
from qlora_planner.models.families import read_shape
from qlora_planner.models.shapes import Linear
from qlora_trainer.model.base_model import quantization_config
from tests.make import make_spec
from tests.unit.planner.public import NAMES, build, load_config

BITS = {4: QuantizationSpec(), 8: QuantizationSpec(bits=8), 16: QuantizationSpec(bits=16)}


def replaced(name: str, quantization: QuantizationSpec) -> Any:
    """A public model as the trainer loads it, on the meta device; a 4-bit matrix is shown unpacked there."""
    model = build(load_config(name), torch.bfloat16)
    config = quantization_config(quantization, torch.bfloat16)
    if config is None:
        return model
    return replace_with_bnb_linear(model, get_keys_to_not_convert(model), config)


def footprint(model: Any) -> int:
    """get_memory_footprint() of the loaded model: bitsandbytes packs on the way to the device, two weights a byte."""
    packed = sum(module.weight.numel() // 2 for module in model.modules() if isinstance(module, Linear4bit))
    single = sum(module.weight.numel() for module in model.modules() if isinstance(module, Linear8bitLt))
    quantized = {id(module.weight) for module in model.modules() if isinstance(module, Linear4bit | Linear8bitLt)}
    rest = [weight for weight in model.parameters() if id(weight) not in quantized]
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    return packed + single + sum(weight.numel() * HALF for weight in rest) + buffers


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("name", NAMES)
def test_weights_of_public_models(name: str, bits: int) -> None:
    ours = base_bytes(read_shape(load_config(name)), BITS[bits], HALF).weights
    assert ours == pytest.approx(footprint(replaced(name, BITS[bits])), rel=0.005)


@pytest.mark.parametrize(
    ("quantization", "width", "lora", "gigabytes"),
    [
        pytest.param(BITS[16], FP32, None, 12.9, id="fp32"),
        pytest.param(BITS[8], HALF, None, 3.6, id="8-bit"),
        pytest.param(BITS[4], HALF, None, 2.2, id="nf4"),
        pytest.param(
            BITS[4], HALF, LoraSpec(rank=32, targets=("q_proj", "k_proj", "v_proj", "o_proj")), 2.27, id="lora"
        ),
    ],
)
def test_memory_figures_of_llama_3b(
    quantization: QuantizationSpec, width: int, lora: LoraSpec | None, gigabytes: float
) -> None:
    shape = read_shape(load_config("llama-3.2-3b"))
    blocks = {"lora": lora.model_dump(by_alias=True, mode="json")} if lora else {}
    adapter = find_trainable(shape, make_spec(**blocks)).parameters * FP32 if lora else 0
    digits = len(str(gigabytes).partition(".")[2])
    assert round((base_bytes(shape, quantization, width).weights + adapter) / 1e9, digits) == gigabytes


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 96), (576, 192), (1000, 333), (256, 4096)])
def test_constants_match_real_4bit_matrix(inputs: int, outputs: int, double: bool) -> None:
    layer = Linear4bit(inputs, outputs, bias=False, compress_statistics=double, quant_type="nf4").to("cpu")
    state = layer.weight.quant_state
    tensors = [state.absmax, state.code, *([state.offset, state.state2.absmax, state.state2.code] if double else [])]
    quantization = QuantizationSpec(double_quant=double)
    linear = Linear("a", inputs, outputs)
    assert constant_bytes(linear, quantization) == sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_constants_match_real_8bit_matrix() -> None:
    layer = Linear8bitLt(64, 96, bias=False, has_fp16_weights=False).to("cpu")
    assert constant_bytes(Linear("a", 64, 96), BITS[8]) == layer.weight.SCB.numel() * layer.weight.SCB.element_size()


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_optimizer_bytes_match_real_optimizer(optimizer: str) -> None:
    sizes = (100, 4095, 4096, 5000, 120_000)
    weights = [torch.nn.Parameter(torch.zeros(size)) for size in sizes]
    made = bitsandbytes.optim.AdamW8bit(weights) if optimizer == "adamw8bit" else torch.optim.AdamW(weights)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    made.step()
    shared = ("qmap1", "qmap2", "step")
    states = [value for state in made.state.values() for name, value in state.items() if name not in shared]
    assert optimizer_bytes(Trainable(matrices=sizes), optimizer) == sum(  # type: ignore[arg-type]
        state.numel() * state.element_size() for state in states
    )


def test_paged_state_of_large_tensors_leaves_the_gpu() -> None:
    small, large = Trainable(matrices=(99_999,)), Trainable(matrices=(100_000,))
    assert optimizer_bytes(small, "pagedAdamw") == optimizer_bytes(small, "adamw") == 8 * 99_999
    assert optimizer_bytes(large, "pagedAdamw") == 0
    assert optimizer_bytes(large, "pagedAdamw8bit") == 2 * 4 * 391


def test_falcon_and_mixtral_experts_are_not_quantized() -> None:
    falcon, mixtral = (read_shape(load_config(name)) for name in ("falcon-7b", "mixtral-8x7b-v0.1"))
    assert base_bytes(falcon, BITS[4], HALF) == BaseBytes(falcon.parameters * HALF, 0)
    assert base_bytes(mixtral, BITS[4], HALF).weights > 0.95 * mixtral.parameters * HALF
