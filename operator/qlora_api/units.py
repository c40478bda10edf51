"""Units of memory and time, and how people read them."""

from collections.abc import Mapping
from typing import Final

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30
TIB: Final = 1 << 40

SECONDS: Final[Mapping[str, int]] = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
"""Of the units in which durations are written."""
_PAIRS: Final = (("d", "h"), ("h", "m"), ("m", "s"))
"""The two units of a duration, the largest first."""


def format_gib(size: float, digits: int = 1) -> str:
    """Write bytes as 1.5 GiB."""
    return f"{size / GIB:.{digits}f} GiB"


def format_duration(seconds: int) -> str:
    """Write 190 seconds as 3m10s: the two largest units."""
    for large, small in _PAIRS:
        if seconds >= SECONDS[large]:
            return f"{seconds // SECONDS[large]}{large}{seconds % SECONDS[large] // SECONDS[small]:02d}{small}"
    return f"{seconds}s"
