"""Units of memory and time, and their formatting for people."""

from collections.abc import Mapping
from typing import Final

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30
TIB: Final = 1 << 40

SECONDS: Final[Mapping[str, int]] = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
"""Seconds per unit of a duration."""
_PAIRS: Final = (("d", "h"), ("h", "m"), ("m", "s"))
"""The two units that a duration is shown in, largest first."""


def format_gib(size: float, digits: int = 1) -> str:
    """Format bytes as `1.5 GiB`."""
    return f"{size / GIB:.{digits}f} GiB"


def format_duration(seconds: int) -> str:
    """Format 190 seconds as `3m10s`: in the two largest units."""
    for large, small in _PAIRS:
        if seconds >= SECONDS[large]:
            return f"{seconds // SECONDS[large]}{large}{seconds % SECONDS[large] // SECONDS[small]:02d}{small}"
    return f"{seconds}s"
