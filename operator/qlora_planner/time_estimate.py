"""About how long a training takes: from its operations, and what published QLoRA runs reach of a GPU's peak; pure."""

import re
from typing import Final

TERA: Final = 10**12
PEAK_TFLOPS: Final = {
    r"\bT4\b": 65,
    r"\bV100\b": 125,
    r"\bA10\b": 125,
    r"\bA30\b": 165,
    r"\bA40\b": 150,
    r"\bA100\b": 312,
    r"\bL4\b": 121,
    r"\bL40\b": 181,
    r"\bL40S\b": 362,
    r"RTX-3090\b": 71,
    r"RTX-4090\b": 165,
    r"\bH100-PCIE": 756,
    r"\bH100\b": 989,
    r"\bH200\b": 989,
    r"\bB200\b": 2250,
}
"""Operations per second in 16 bits, dense, in tera: NVIDIA's data sheets, by what the product's label has."""
MFU_RANGE: Final = (0.22, 0.47)
"""Shares of the peak in published runs at 4 operations a weight and token: 70B on four H100 (fsdp_qlora's benchmarks,
March 2024) and 8B on one RTX 4090 (torchtune's README); a 3B model on an A100 reached 0.33 (the same README)."""
_FORWARD_AND_BACKWARD: Final = 4
"""Operations per weight and token: two forward, two for the gradient of its input; a frozen weight has none itself."""
_RECOMPUTED: Final = 6
"""With gradient checkpointing, which goes forward twice."""
_MINUTE: Final = 60
_HOUR: Final = 3600


def explain_duration(product: str, gpus: int, weights: int, tokens: float, *, recomputed: bool) -> tuple[str, ...]:
    """Return a sentence with the shortest and the longest time to expect; none for a GPU whose peak is unknown."""
    peak = peak_flops(product)
    if peak is None:
        return ()
    operations = (_RECOMPUTED if recomputed else _FORWARD_AND_BACKWARD) * weights * tokens
    longest, shortest = (operations / (gpus * peak * share) for share in MFU_RANGE)
    return (
        f"training about {to_text(shortest)} to {to_text(longest)}: {tokens:.2g} tokens at {MFU_RANGE[0]:.0%} to "
        f"{MFU_RANGE[1]:.0%} of {peak // TERA} TFLOP/s, as published runs reached; evaluation and upload not counted",
    )


def peak_flops(product: str) -> int | None:
    """Return a GPU's operations per second, by the value of nvidia.com/gpu.product."""
    return next((tera * TERA for name, tera in PEAK_TFLOPS.items() if re.search(name, product, re.IGNORECASE)), None)


def to_text(seconds: float) -> str:
    """Write a duration as roughly as it is known."""
    if seconds < 2 * _MINUTE:
        return f"{max(round(seconds), 1)} s"
    return f"{round(seconds / _MINUTE)} min" if seconds < 2 * _HOUR else f"{seconds / _HOUR:.2g} h"
