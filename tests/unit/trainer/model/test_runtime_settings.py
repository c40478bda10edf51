"""Settings that hardware and model decide: dtype, attention, gradient checkpointing, optimizer."""

from typing import Any

import pytest
import torch
from transformers import Gemma2Config, GPT2Config, GPTNeoXConfig, LlamaConfig

from qlora_api.accelerators import NVIDIA
from qlora_api.reasons import Reason
from qlora_api.runconfig import RunConfig
from qlora_trainer.errors import RunError
from qlora_trainer.model.attention import FLASH, AttentionFacts, attention_facts, choose_attention
from qlora_trainer.model.full_finetune import check_parameter_limit, choose_full_finetune_optimizer
from qlora_trainer.model.hardware import Hardware, check_kernels, observe_hardware
from qlora_trainer.model.optimizer import OptimizerKind
from qlora_trainer.model.runtime_settings import choose_gradient_checkpointing, compute_dtype, resolve_runtime_settings
from tests.make import make_prepared
from tests.unit.trainer.tiny import make_spec, run_config

GIB = 1 << 30
CPU = Hardware("cpu", None, native_bf16=False, free_bytes=8 * GIB, name="CPU, 2 threads")


def gpu(*capability: int, flash: bool = True) -> Hardware:
    major, minor = capability
    return Hardware("cuda", (major, minor), (major, minor) >= (8, 0), 20 * GIB, "GPU", flash)


@pytest.mark.parametrize(
    ("hardware", "family", "dtype", "reason"),
    [
        (gpu(9, 0), "llama", torch.bfloat16, "sm_90 has native bf16"),
        (gpu(8, 0), "gemma3_text", torch.bfloat16, "sm_80 has native bf16"),
        (gpu(7, 5), "llama", torch.float16, "sm_75 predates native bf16"),
        (gpu(7, 5), "gemma3_text", torch.float32, "gemma3_text overflows in fp16"),
        (gpu(7, 5), "qwen3_moe", torch.float32, "qwen3_moe overflows in fp16"),
        (CPU, "llama", torch.float32, "the CPU has no native bf16"),
        (Hardware("cpu", None, True, GIB, "CPU"), "gemma2", torch.bfloat16, "AVX512-BF16"),
    ],
)
def test_compute_dtype_by_hardware_and_family(hardware, family, dtype, reason):
    found, why = compute_dtype(hardware, family)
    assert (found, reason in why) == (dtype, True)


PLAIN = {"logit_softcapping": False, "head_size": 128, "sdpa": True, "flash": True}


@pytest.mark.parametrize(
    ("changes", "hardware", "kernel", "reason"),
    [
        ({}, gpu(8, 0), FLASH, "cost no more than separate"),
        ({"head_size": 256}, gpu(9, 0), FLASH, "cost no more than separate"),
        ({}, CPU, "sdpa", "the device is a CPU"),
        ({}, gpu(7, 5), "sdpa", "sm_75 is older than sm_80"),
        ({}, gpu(8, 0, flash=False), "sdpa", "flash_attn is not in the image"),
        ({"flash": False}, gpu(8, 0), "sdpa", "does not support it"),
        ({"head_size": 512}, gpu(9, 0), "sdpa", "heads of 512"),
        ({"head_size": 100}, gpu(9, 0), "sdpa", "heads of 100"),
        ({"logit_softcapping": True}, gpu(9, 0), "eager", "caps attention scores"),
        ({"sdpa": False, "flash": False}, gpu(9, 0), "eager", "no faster kernel"),
    ],
)
def test_choose_attention_by_architecture_and_hardware(changes, hardware, kernel, reason):
    found, why = choose_attention(AttentionFacts(**PLAIN | changes), hardware)
    assert (found, reason in why) == (kernel, True), why


@pytest.mark.parametrize(
    ("config", "facts"),
    [
        (LlamaConfig(hidden_size=64, num_attention_heads=4), AttentionFacts(False, 16, sdpa=True, flash=True)),
        (Gemma2Config(head_dim=256), AttentionFacts(True, 256, sdpa=False, flash=True)),
        (GPTNeoXConfig(hidden_size=512, num_attention_heads=8), AttentionFacts(False, 64, sdpa=True, flash=True)),
        (GPT2Config(n_embd=96, n_head=4), AttentionFacts(False, 24, sdpa=True, flash=True)),
    ],
)
def test_attention_facts_of_architectures(config, facts):
    assert attention_facts(config) == facts


def test_gradient_checkpointing_is_on_if_activations_do_not_fit():
    small, large = LlamaConfig(hidden_size=64, num_hidden_layers=2), LlamaConfig()
    assert choose_gradient_checkpointing(CPU, small, 4096)[0] is False
    on, why = choose_gradient_checkpointing(CPU, large, 4096)
    assert on
    assert why == "4096 tokens need about 17.0 GiB of activations, and half of the free memory is 4.0 GiB"


def config(**blocks: Any) -> RunConfig:
    spec = make_spec("hf://o/m", "s3://data/rows.jsonl", "s3://out/x", **blocks)
    return run_config(spec, make_prepared())


MODEL = LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4)


def test_every_runtime_setting_has_a_reason():
    settings = resolve_runtime_settings(config(training={"optimizer": "pagedAdamw"}), CPU, MODEL)
    assert (settings.dtype, settings.attention, settings.optimizer) == (torch.float32, "sdpa", OptimizerKind.ADAMW)
    assert list(settings.reasons) == [
        "device", "dtype", "attention", "gradient checkpointing", "packing", "optimizer", "start",
    ]  # fmt: skip
    assert settings.reasons["optimizer"].startswith("adamw: pagedAdamw without pages")
    off = settings.without_packing("it leaks")
    assert (off.packing, off.reasons["packing"]) == (False, "off: it leaks")


@pytest.mark.parametrize(("planned", "value"), [(True, "on"), (False, "off")])
def test_plan_decides_gradient_checkpointing(planned, value):
    sized = config()
    sized = sized.model_copy(update={"plan": sized.plan.model_copy(update={"gradient_checkpointing": planned})})
    settings = resolve_runtime_settings(sized, CPU, MODEL)
    assert settings.gradient_checkpointing is planned
    assert settings.reasons["gradient checkpointing"].startswith(f"{value}: the plan, from the model's shape")


@pytest.mark.parametrize(
    ("requested", "device", "parameters", "kind", "reason"),
    [
        (
            "auto",
            gpu(8, 0),
            10**9,
            OptimizerKind.ADAMW_FUSED,
            "its fp32 state fits; weights, gradients and state take 14.9 GiB",
        ),
        ("auto", gpu(8, 0), 1_500_000_000, OptimizerKind.ADAMW_8BIT, "with fp32 state the model would not fit"),
        ("pagedAdamw8bit", gpu(8, 0), 2 * 10**9, OptimizerKind.PAGED_ADAMW_8BIT, "spec.training.optimizer"),
        ("auto", CPU, 10**8, OptimizerKind.ADAMW, "its fp32 state fits"),
    ],
)
def test_full_finetune_optimizer_is_the_one_that_fits(requested, device, parameters, kind, reason):
    found, why = choose_full_finetune_optimizer(requested, device, parameters)
    assert (found, reason in why) == (kind, True), why


@pytest.mark.parametrize(("requested", "parameters"), [("auto", 2 * 10**9), ("adamw", 1_500_000_000)])
def test_full_finetune_beyond_memory_is_refused_before_loading(requested, parameters):
    with pytest.raises(RunError, match=r"spec.method: full needs .* GiB for .* weights") as caught:
        choose_full_finetune_optimizer(requested, gpu(8, 0), parameters)
    assert caught.value.reason == Reason.INVALID_SPEC


def test_zero2_shards_gradients_and_optimizer_state():
    with pytest.raises(RunError):
        choose_full_finetune_optimizer("adamw", gpu(8, 0), 2 * 10**9)
    found, why = choose_full_finetune_optimizer("auto", gpu(8, 0), 2 * 10**9, parts=4)
    assert found is OptimizerKind.ADAMW_FUSED
    assert why == "its fp32 state fits; weights, gradients and state take 14.9 GiB"
    with pytest.raises(RunError, match=r"needs 29\.8 GiB for 4,000,000,000 weights with adamw_fused"):
        choose_full_finetune_optimizer("auto", gpu(8, 0), 4 * 10**9, parts=4)


def test_model_beyond_parameter_limit_is_refused():
    check_parameter_limit("LlamaForCausalLM", 7_000_000_000)
    with pytest.raises(RunError, match="LlamaForCausalLM has 70,000,000,000 weights, and method full supports 20,000,"):
        check_parameter_limit("LlamaForCausalLM", 70_000_000_000)


def test_full_finetune_weights_reduce_memory_for_activations():
    spec = {"method": "full", "quantization": {"bits": 16}}
    settings = resolve_runtime_settings(config(**spec), CPU, MODEL)
    assert settings.reasons["start"] == "every weight as the base has it"
    assert "half of the free memory is 3.0 GiB" in settings.reasons["gradient checkpointing"]


def test_observe_hardware_detects_cpu_and_free_memory():
    hardware = observe_hardware("cpu")
    assert (hardware.device, hardware.capability, hardware.free_bytes > 0) == ("cpu", None, True)


PINNED = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")


@pytest.mark.parametrize(
    ("capability", "architectures", "supported"),
    [
        pytest.param((7, 5), PINNED, True, id="t4"),
        pytest.param((8, 9), PINNED, True, id="l4-runs-sm_86"),
        pytest.param((12, 1), PINNED, True, id="later-minor-version"),
        pytest.param((7, 0), PINNED, False, id="v100"),
        pytest.param((6, 0), PINNED, False, id="p100"),
        pytest.param((11, 0), PINNED, False, id="between"),
        pytest.param((11, 0), (*PINNED, "compute_90"), True, id="compiled-when-loaded"),
        pytest.param((9, 0), ("sm_90a",), True, id="hopper-only"),
    ],
)
def test_gpu_that_torch_has_no_kernels_for_is_refused(capability, architectures, supported):
    if supported:
        check_kernels(capability, architectures, "GPU")
        return
    with pytest.raises(RunError, match=r"has kernels for.*spec\.resources\.gpuProduct") as caught:
        check_kernels(capability, architectures, "GPU")
    assert caught.value.reason == Reason.ACCELERATOR_MISSING


def test_planner_and_torch_agree_on_the_oldest_gpu():
    oldest = NVIDIA.oldest_capability
    if torch.cuda.get_arch_list():
        check_kernels(oldest, torch.cuda.get_arch_list(), "oldest")
        with pytest.raises(RunError):
            check_kernels((oldest[0], oldest[1] - 1), torch.cuda.get_arch_list(), "older")
    else:
        check_kernels(oldest, PINNED, "oldest")  # a torch for CPUs has no list
