"""Estimates the duration of training from its FLOPs and the MFU of published QLoRA runs; pure."""

import re
from typing import Final

from qlora_api.accelerators import ACCELERATORS, NVIDIA

TERA: Final = 10**12
MFU_RANGE: Final = (0.22, 0.47)
"""Lowest and highest MFU of published runs at 4 FLOPs per weight and token: 70B on four H100 (fsdp_qlora's benchmarks,
March 2024) and 8B on one RTX 4090 (torchtune's README); a 3B model on an A100 reached 0.33 (the same README)."""
_FORWARD_AND_BACKWARD: Final = 4
"""FLOPs per weight and token: two forward, two for the gradient of the input; frozen weights have no gradient."""
_WITH_RECOMPUTATION: Final = 6
"""FLOPs with gradient checkpointing, which computes the forward pass twice."""
_MINUTE: Final = 60
_HOUR: Final = 3600


def explain_duration(product: str, gpus: int, weights: int, tokens: float, *, recomputed: bool) -> tuple[str, ...]:
    """Return one reason with the expected range of the duration; none for a GPU whose peak is unknown.

    Args:
        product: Value of the product label, such as NVIDIA-A100-SXM4-80GB.
        gpus: Number of GPUs.
        weights: Weights that each token is multiplied with, without the embedding.
        tokens: Training tokens of all steps.
        recomputed: Whether gradient checkpointing is on.

    """
    peak = peak_flops(product)
    if peak is None:
        return ()
    flops = (_WITH_RECOMPUTATION if recomputed else _FORWARD_AND_BACKWARD) * weights * tokens
    longest, shortest = (flops / (gpus * peak * mfu) for mfu in MFU_RANGE)
    return (
        f"training about {to_text(shortest)} to {to_text(longest)}: {tokens:.2g} tokens at {MFU_RANGE[0]:.0%} to "
        f"{MFU_RANGE[1]:.0%} of {peak // TERA} TFLOP/s, as published runs reached; evaluation and upload not counted",
    )


def peak_flops(product: str) -> int | None:
    """Return the peak FLOP/s of a GPU by the value of its product label; None if unknown, or if it is a partition."""
    if NVIDIA.partition_mark in product:
        return None
    known = ((name, tera) for accelerator in ACCELERATORS for name, tera in accelerator.peak_tflops.items())
    return next((tera * TERA for name, tera in known if re.search(name, product, re.IGNORECASE)), None)


def to_text(seconds: float) -> str:
    """Format a duration in seconds, rounded to what is known of it."""
    if seconds < 2 * _MINUTE:
        return f"{max(round(seconds), 1)} s"
    return f"{round(seconds / _MINUTE)} min" if seconds < 2 * _HOUR else f"{seconds / _HOUR:.2g} h"
