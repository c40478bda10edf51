"""vLLM's command-line options for LoRA adapters."""

from typing import Final

VLLM_MAX_LORA_RANKS: Final = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values that --max-lora-rank accepts; an adapter with a lower rank is padded."""


def max_lora_rank_for(rank: int) -> int | None:
    """Return the lowest --max-lora-rank that is enough for a rank, or None if none is."""
    return next((allowed for allowed in VLLM_MAX_LORA_RANKS if rank <= allowed), None)
