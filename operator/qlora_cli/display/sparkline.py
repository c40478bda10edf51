"""Sparklines: a series of numbers as a line of small bars."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Final

BARS: Final = "▁▂▃▄▅▆▇█"


def sparkline(numbers: Sequence[float], width: int) -> str:
    """Return a sparkline of at most `width` characters, scaled from the minimum to the maximum."""
    shown = condense(numbers, width)
    if not shown:
        return ""
    low, high = min(shown), max(shown)
    top = len(BARS) - 1
    return "".join(BARS[round((number - low) / (high - low) * top) if high > low else 0] for number in shown)


def condense(numbers: Sequence[float], width: int) -> list[float]:
    """Return at most `width` numbers, each the mean of a group of consecutive ones."""
    if len(numbers) <= width:
        return list(numbers)
    edges = [len(numbers) * index // width for index in range(width + 1)]
    return [sum(numbers[low:high]) / (high - low) for low, high in pairwise(edges)]
