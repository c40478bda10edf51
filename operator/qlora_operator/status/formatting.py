"""Formats numbers for the printer columns."""

from typing import Final

LARGE: Final = 1e6
"""Numbers from here on are written with an exponent, so that they fit their column."""


def format_number(number: float, digits: int) -> str:
    """Format a number with fixed digits, or with an exponent if it is huge."""
    return f"{number:.{digits}f}" if abs(number) < LARGE else f"{number:.2e}"


def format_step(step: int | None, total: int | None) -> str | None:
    """Format as 120/300, or 120 if the total is unknown."""
    if step is None:
        return None
    return str(step) if total is None else f"{step}/{total}"
