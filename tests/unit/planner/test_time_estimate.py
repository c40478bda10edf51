"""The time to expect, held to the runs that it comes from."""

import pytest

from qlora_planner.time_estimate import explain_duration, peak_flops, to_text

LLAMA_8B = 8_030_261_248


@pytest.mark.parametrize(
    ("product", "tera"),
    [
        ("Tesla-T4", 65),
        ("NVIDIA-A10", 125),
        ("NVIDIA-A100-SXM4-80GB", 312),
        ("NVIDIA-L4", 121),
        ("NVIDIA-L40", 181),
        ("NVIDIA-L40S", 362),
        ("NVIDIA-H100-PCIe", 756),
        ("NVIDIA-H100-80GB-HBM3", 989),
        ("NVIDIA-GeForce-RTX-4090", 165),
        ("NVIDIA-A10G", None),
        ("NVIDIA-A100-SXM4-80GB-MIG-3g.40gb", None),
        ("", None),
    ],
)
def test_product_name_maps_to_peak_flops(product: str, tera: int | None) -> None:
    assert peak_flops(product) == (tera * 10**12 if tera else None)


def test_published_runs_are_within_range() -> None:
    """torchtune's README: Llama-3.1-8B, QLoRA, one RTX 4090, 2,413 tokens a second; an hour of that."""
    (sentence,) = explain_duration("NVIDIA-GeForce-RTX-4090", 1, LLAMA_8B, 2413 * 3600, recomputed=False)
    assert sentence.startswith("training about 60 min to 2.1 h: 8.7e+06 tokens at 22% to 47% of 165 TFLOP/s")


def test_duration_scales_with_gpus_and_checkpointing() -> None:
    def first(gpus: int, recomputed: bool) -> str:
        return explain_duration("NVIDIA-A100-SXM4-40GB", gpus, LLAMA_8B, 1e8, recomputed=recomputed)[0].split(" to ")[0]

    assert first(1, False) == "training about 6.1 h"
    assert first(4, False) == "training about 91 min"
    assert first(1, True) == "training about 9.1 h"


def test_unknown_gpu_has_no_time_estimate() -> None:
    assert explain_duration("AMD-Instinct", 1, LLAMA_8B, 1e6, recomputed=False) == ()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "1 s"), (119.4, "119 s"), (120, "2 min"), (7199, "120 min"), (7200, "2 h"), (1e5, "28 h")],
)
def test_time_estimate_is_rounded(seconds: float, text: str) -> None:
    assert to_text(seconds) == text
