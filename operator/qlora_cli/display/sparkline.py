"""A row of numbers as a row of small bars."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Final

BARS: Final = "▁▂▃▄▅▆▇█"


def sparkline(numbers: Sequence[float], width: int) -> str:
    """Draw numbers from their least to their greatest; more than fit are averaged in groups."""
    shown = condense(numbers, width)
    if not shown:
        return ""
    low, high = min(shown), max(shown)
    top = len(BARS) - 1
    return "".join(BARS[round((number - low) / (high - low) * top) if high > low else 0] for number in shown)


def condense(numbers: Sequence[float], width: int) -> list[float]:
    """Return at most so many numbers, each the mean of its neighbours."""
    if len(numbers) <= width:
        return list(numbers)
    edges = [len(numbers) * place // width for place in range(width + 1)]
    return [sum(numbers[low:high]) / (high - low) for low, high in pairwise(edges)]
