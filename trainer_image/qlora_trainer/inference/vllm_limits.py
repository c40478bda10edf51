"""Checks an adapter's configuration and tensor shapes against vLLM's LoRA limits; vLLM itself is not needed.

Sources: vLLM's lora/peft_helper.py, lora/utils.py, lora/lora_model.py and config/lora.py.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from safetensors import safe_open

from qlora_api.foreign_files import read_object
from qlora_api.model_config import MAX_CONFIG_BYTES
from qlora_api.report import ServingCheck
from qlora_api.vllm import VLLM_MAX_LORA_RANKS, max_lora_rank_for

VLLM_DEFAULT_RANK: Final = 16
VLLM_MODULES: Final = (
    # Llama and most since, with their own names or packed as vLLM does
    {"q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "gate_proj", "up_proj", "down_proj", "gate_up_proj"}
    # Phi, GPT-NeoX, Falcon, Bloom, OPT, StarCoder2
    | {"dense", "fc1", "fc2", "query_key_value", "dense_h_to_4h", "dense_4h_to_h", "out_proj"}
    # GPT-2, MPT, InternLM2, Baichuan
    | {"c_attn", "c_proj", "c_fc", "Wqkv", "wqkv", "wo", "w1", "w2", "w3", "W_pack"}
    # Mamba, and multi-head latent attention
    | {"in_proj", "x_proj", "dt_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"}
)
"""Last components of the names of linear layers in vLLM's decoders."""
_PREFIX: Final = "base_model.model."
_SUFFIXES: Final = (".lora_A.weight", ".lora_B.weight")

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of tensors by their names in adapter_model.safetensors."""


def check_vllm_limits(adapter: Path) -> ServingCheck:
    """Check the files of an adapter; a full model has no limits, vLLM serves it directly."""
    if not (adapter / "adapter_config.json").is_file():
        return ServingCheck(vllm=True, max_lora_rank=None)
    config = read_object(adapter / "adapter_config.json", MAX_CONFIG_BYTES)
    problems = vllm_problems(config, read_shapes(adapter))
    return ServingCheck(vllm=not problems, problems=problems, max_lora_rank=max_lora_rank_for(int(config["r"])))


def read_shapes(adapter: Path) -> Shapes:
    """Return the shapes of an adapter's tensors without loading them."""
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as tensors:
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118


def vllm_problems(config: Mapping[str, Any], shapes: Shapes) -> tuple[str, ...]:
    """Return every reason why vLLM would reject an adapter or serve it incorrectly."""
    rank = None if config.get("rank_pattern") else int(config["r"])
    return (*_config_problems(config), *_tensor_problems(rank, shapes))


def _config_problems(config: Mapping[str, Any]) -> Iterator[str]:
    if config.get("use_dora"):
        yield "it is a DoRA adapter, which vLLM does not load; merge it (spec.output.merged)"
    if config.get("modules_to_save"):
        yield f"it replaces modules ({', '.join(config['modules_to_save'])}), which vLLM does not load; merge it"
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        yield "it changes biases, which vLLM does not load; merge it"
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        yield "its modules differ in rank or alpha, but vLLM would scale all of them equally; merge it"
    if max_lora_rank_for(int(config["r"])) is None:
        yield (
            f"its rank is {config['r']}, but vLLM's limit is {VLLM_MAX_LORA_RANKS[-1]}; merge it, or train with a "
            "lower rank"
        )


def _tensor_problems(rank: int | None, shapes: Shapes) -> Iterator[str]:
    foreign = [name for name in shapes if not (name.startswith(_PREFIX) and name.endswith(_SUFFIXES))]
    if foreign:
        yield f"{len(foreign)} tensors are not LoRA weights of linear layers in vLLM's terms, such as {foreign[0]}"
    lora_shapes = {name: shape for name, shape in shapes.items() if name not in foreign}
    unknown = sorted({_module(name) for name in lora_shapes} - VLLM_MODULES)
    if unknown:
        yield f"it adapts {', '.join(unknown)}, which is not a known name of a layer in vLLM's decoders"
    wrong = [name for name, shape in lora_shapes.items() if rank is not None and _rank_of(name, shape) != rank]
    if wrong:
        yield f"{len(wrong)} tensors do not have the rank {rank} of the configuration, such as {wrong[0]}"


def _module(name: str) -> str:
    return name.removesuffix(_SUFFIXES[0]).removesuffix(_SUFFIXES[1]).rpartition(".")[2]


def _rank_of(name: str, shape: tuple[int, ...]) -> int:
    """A is [rank, inputs] and B is [outputs, rank]."""
    return shape[0] if name.endswith(_SUFFIXES[0]) else shape[1]
