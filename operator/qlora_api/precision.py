"""In which dtype a run computes: decided by the GPU and by the model's family, for plan and trainer alike."""

from collections.abc import Mapping
from typing import Final, Literal

ComputeDtype = Literal["bfloat16", "float16", "float32"]
NATIVE_BF16: Final = (8, 0)
"""Lowest compute capability with native bf16 (NVIDIA Ampere)."""
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


def compute_dtype_of(capability: tuple[int, int], model_type: str) -> tuple[ComputeDtype, str]:
    """Return the dtype that a GPU computes in, and the reason.

    Args:
        capability: Compute capability of the GPU: (8, 0) is sm_80.
        model_type: Family of the language model, from its config.json.

    """
    sm = f"sm_{capability[0]}{capability[1]}"
    if capability >= NATIVE_BF16:
        return "bfloat16", f"{sm} has native bf16"
    if model_type in OVERFLOWS_IN_FP16:
        return "float32", f"{sm} predates native bf16, and {model_type} overflows in fp16"
    return "float16", f"{sm} predates native bf16"
