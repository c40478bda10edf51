"""The memory of a run, as it was predicted and as it was measured."""

from dataclasses import dataclass

from qlora_api.units import format_gib
from qlora_api.v1alpha1 import Plan


@dataclass(frozen=True)
class Amount:
    """Memory of one device."""

    label: str
    value: str
    share: float
    """Of the larger one, from 0 to 1: the length of its bar."""


@dataclass(frozen=True)
class Footprint:
    """Both amounts, or the one that is known."""

    amounts: tuple[Amount, ...]
    note: str


def make_footprint(plan: Plan, limit: str, measured: int) -> Footprint:
    """Return what the plan said and what the device had to give; `limit` is a pod's memory."""
    predicted = plan.peak_bytes
    largest = max(predicted or 0, measured)
    named = [("measured", measured)] if predicted is None else [("predicted", predicted), ("measured", measured)]
    amounts = tuple(Amount(label, format_gib(size, 2), size / largest) for label, size in named)
    return Footprint(amounts, f"{_describe_difference(predicted, measured)} {_describe_measure(plan, limit)}")


def _describe_difference(predicted: int | None, measured: int) -> str:
    if predicted is None:
        return "The plan predicts none: it computes sizes for GPUs, and for models whose shape it knows."
    if measured == predicted:
        return "It took what was predicted."
    side = "less" if measured < predicted else "more"
    return f"It took {abs(measured - predicted) / predicted:.1%} {side} than predicted."


def _describe_measure(plan: Plan, limit: str) -> str:
    """Say what was measured: the two amounts are not of quite the same things."""
    if plan.device == "cpu":
        return f"Measured is the most of the process's resident set, libraries included; the pod's memory is {limit}."
    return (
        "Measured is the most that torch's allocator held of the first GPU. The prediction has CUDA's context and a "
        "slack of the allocator as well; its parts are among the plan's reasons."
    )
