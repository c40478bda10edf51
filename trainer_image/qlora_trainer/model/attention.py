"""Choice of the attention kernel, from what the architecture supports and what the device supports."""

from dataclasses import dataclass
from typing import Any, Final

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from qlora_trainer.model.hardware import Hardware

FLASH: Final = "flash_attention_2"
_FLASH_CAPABILITY: Final = (8, 0)
"""FlashAttention 2 needs Ampere (its README)."""
_FLASH_HEAD_SIZE: Final = 256
"""Largest head dimension for which FlashAttention 2 has a backward pass (its README)."""


@dataclass(frozen=True)
class AttentionFacts:
    """What an architecture supports."""

    logit_softcapping: bool
    """It caps attention scores (Gemma 2); transformers refuses that with SDPA, and few other kernels support it."""
    head_size: int
    """0 without attention."""
    sdpa: bool
    flash: bool


def attention_facts(model: Any) -> AttentionFacts:
    """Read the facts from a model's configuration and class."""
    known = type(model) in MODEL_FOR_CAUSAL_LM_MAPPING
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(model)] if known else None
    sizes = [size for name in ("head_dim", "global_head_dim") for size in _layer_values(model, name)]
    heads = min((count for count in _layer_values(model, "num_attention_heads") if count), default=0)
    return AttentionFacts(
        logit_softcapping=bool(getattr(model, "attn_logit_softcapping", None)),
        head_size=max([size for size in sizes if size] or [model.hidden_size // heads if heads else 0]),
        sdpa=bool(getattr(model_class, "_supports_sdpa", True)),
        flash=bool(getattr(model_class, "_supports_flash_attn", False)),
    )


def _layer_values(model: Any, name: str) -> tuple[Any, ...]:
    """Return the values of a setting; one that varies between layers cannot be read from the whole configuration."""
    if name in (getattr(model, "per_layer_attributes", None) or ()):
        return tuple(getattr(layer, name) for layer in model.per_layer_config)
    return (getattr(model, name, None),)


def choose_attention(facts: AttentionFacts, hardware: Hardware) -> tuple[str, str]:
    """Return the kernel and the reason; the first obstacle to a faster kernel decides."""
    if facts.logit_softcapping:
        return "eager", "the model caps attention scores, which SDPA cannot"
    if not facts.sdpa:
        return "eager", "the architecture supports no faster kernel"
    obstacle = _against_flash(facts, hardware)
    if obstacle:
        return "sdpa", f"torch's own kernel, exact with packed rows; no FlashAttention: {obstacle}"
    return FLASH, "packed rows cost no more than separate ones"


def _against_flash(facts: AttentionFacts, hardware: Hardware) -> str:
    if hardware.capability is None:
        return "the device is a CPU"
    if hardware.capability < _FLASH_CAPABILITY:
        return f"sm_{hardware.capability[0]}{hardware.capability[1]} is older than sm_80"
    if not hardware.flash_attention:
        return "flash_attn is not in the image"
    if not facts.flash:
        return "the architecture does not support it"
    if facts.head_size > _FLASH_HEAD_SIZE or facts.head_size % 8:
        return f"heads of {facts.head_size} are not supported (multiples of 8 up to {_FLASH_HEAD_SIZE})"
    return ""
