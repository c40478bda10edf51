"""Which attention kernel a model gets: a pure choice from what its architecture allows and what the device can."""

from dataclasses import dataclass
from typing import Any, Final

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from qlora_trainer.model.hardware import Hardware

FLASH: Final = "flash_attention_2"
_FLASH_CAPABILITY: Final = (8, 0)
"""FlashAttention 2 needs Ampere (its README)."""
_FLASH_HEAD_SIZE: Final = 256
"""Widest head that FlashAttention 2 has a backward pass for (its README)."""


@dataclass(frozen=True)
class AttentionFacts:
    """What an architecture allows."""

    logit_softcapping: bool
    """It caps attention scores (Gemma 2): transformers refuses that with SDPA, and few other kernels have it."""
    head_size: int
    sdpa: bool
    flash: bool


def attention_facts(model: Any) -> AttentionFacts:
    """Read them from a model's configuration and its class."""
    known = type(model) in MODEL_FOR_CAUSAL_LM_MAPPING
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(model)] if known else None
    sizes = [getattr(model, name, None) for name in ("head_dim", "global_head_dim")]
    return AttentionFacts(
        logit_softcapping=bool(getattr(model, "attn_logit_softcapping", None)),
        head_size=max([size for size in sizes if size] or [model.hidden_size // model.num_attention_heads]),
        sdpa=bool(getattr(kind, "_supports_sdpa", True)),
        flash=bool(getattr(kind, "_supports_flash_attn", False)),
    )


def choose_attention(facts: AttentionFacts, hardware: Hardware) -> tuple[str, str]:
    """Return the kernel and why it is that one: the first reason against a faster one decides."""
    if facts.logit_softcapping:
        return "eager", "the model caps attention scores, which SDPA cannot"
    if not facts.sdpa:
        return "eager", "the architecture has no faster one"
    obstacle = _against_flash(facts, hardware)
    if obstacle:
        return "sdpa", f"torch's own kernel, exact with joined rows; no FlashAttention: {obstacle}"
    return FLASH, "joined rows cost what they cost alone"


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
        return f"heads of {facts.head_size} are not among its sizes (multiples of 8 up to {_FLASH_HEAD_SIZE})"
    return ""
