"""Numbers as the ready strings of the printer columns."""

from typing import Final

_UNITS: Final = ((86_400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s"))
"""Seconds of the larger unit, its letter, seconds of the smaller unit, its letter."""
LARGE: Final = 1e6
"""From here on a number is written with an exponent, so that it fits its column."""


def format_eta(seconds: int) -> str:
    """Write 190 seconds as 3m10s: the two largest units."""
    for large, large_letter, small, small_letter in _UNITS:
        if seconds >= large:
            return f"{seconds // large}{large_letter}{seconds % large // small:02d}{small_letter}"
    return f"{seconds}s"


def format_number(number: float, digits: int) -> str:
    """Write a number with fixed digits, or with an exponent when it is huge."""
    return f"{number:.{digits}f}" if abs(number) < LARGE else f"{number:.2e}"


def format_step(step: int | None, total: int | None) -> str | None:
    """Write 120/300, or 120 when the total is unknown."""
    if step is None:
        return None
    return str(step) if total is None else f"{step}/{total}"
