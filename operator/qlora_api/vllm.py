"""What vLLM's command line takes for an adapter."""

from typing import Final

VLLM_MAX_LORA_RANKS: Final = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values that --max-lora-rank takes; an adapter of a lower rank is padded."""


def max_lora_rank_for(rank: int) -> int | None:
    """Return the lowest --max-lora-rank that fits, or None where none does."""
    return next((allowed for allowed in VLLM_MAX_LORA_RANKS if rank <= allowed), None)
