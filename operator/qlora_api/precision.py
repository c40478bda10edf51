"""In which dtype a run computes: decided by the GPU and by the model's family, for plan and trainer alike."""

from collections.abc import Mapping
from typing import Final, Literal

from qlora_api.accelerators import Accelerator, Capability

ComputeDtype = Literal["bfloat16", "float16", "float32"]
_VLLM: Final = "vLLM refuses it in float16 (config/model.py, _FLOAT16_NOT_SUPPORTED_MODELS)"
_UNSLOTH: Final = "Unsloth computes it in float32 (models/loader.py, FORCE_FLOAT32)"
_UNSLOTH_MOE: Final = "its gradients overflow (unsloth-zoo#866)"
OVERFLOWS_IN_FP16: Final[Mapping[str, str]] = {
    "gemma2": _VLLM,
    "gemma3": _UNSLOTH,
    "gemma3_text": _UNSLOTH,
    "gemma3n": _UNSLOTH,
    "gemma3n_text": _UNSLOTH,
    "gemma4": _UNSLOTH_MOE,
    "gemma4_text": _UNSLOTH_MOE,
    "glm4": _VLLM,
    "glm4_moe": _UNSLOTH_MOE,
    "gpt_oss": _UNSLOTH,
    "qwen3_5": _UNSLOTH,
    "qwen3_5_text": _UNSLOTH,
    "qwen3_5_moe": _UNSLOTH,
    "qwen3_5_moe_text": _UNSLOTH,
    "qwen3_moe": _UNSLOTH_MOE,
}
"""model_type of families that exceed the range of fp16, and who found it; where a GPU has no bf16 they need fp32."""


def compute_dtype_of(accelerator: Accelerator, capability: Capability | None, model_type: str) -> ComputeDtype | None:
    """Return the dtype that a GPU computes in; None if its capability has to be known.

    Args:
        accelerator: Its vendor's.
        capability: Its compute capability: (8, 0) is sm_80.
        model_type: Family of the language model, from its config.json.

    """
    native = accelerator.has_native_bf16(capability)
    if native is None:
        return None
    return "bfloat16" if native else "float32" if model_type in OVERFLOWS_IN_FP16 else "float16"


def explain_choice(dtype: ComputeDtype, gpu: str, model_type: str) -> str:
    """Explain the dtype that a GPU, named by its capability or product, computes in."""
    if dtype == "bfloat16":
        return f"{gpu} has native bf16"
    overflow = f", and {model_type} overflows in fp16" if dtype == "float32" else ""
    return f"{gpu} predates native bf16{overflow}"


def name_capability(capability: Capability) -> str:
    """Return a compute capability as CUDA names it: sm_80."""
    return f"sm_{capability[0]}{capability[1]}"
