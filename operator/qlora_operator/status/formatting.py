"""Numbers as the ready strings of the printer columns."""

from typing import Final

LARGE: Final = 1e6
"""From here on a number is written with an exponent, so that it fits its column."""


def format_number(number: float, digits: int) -> str:
    """Write a number with fixed digits, or with an exponent when it is huge."""
    return f"{number:.{digits}f}" if abs(number) < LARGE else f"{number:.2e}"


def format_step(step: int | None, total: int | None) -> str | None:
    """Write 120/300, or 120 when the total is unknown."""
    if step is None:
        return None
    return str(step) if total is None else f"{step}/{total}"
