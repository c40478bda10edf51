"""Kubernetes quantities: amounts of memory in bytes, and of CPU in cores."""

import re
from math import isfinite
from typing import Final

from qlora_api.units import GIB, KIB, MIB, TIB

_UNITS: Final = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY: Final = {"Ki": KIB, "Mi": MIB, "Gi": GIB, "Ti": TIB}
_QUANTITY: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)(Ki|Mi|Gi|Ti|k|M|G|T)?")
_MILLI: Final = 1000


def parse_quantity(quantity: str) -> int:
    """Return a Kubernetes quantity, such as 24Gi or 80G, in bytes.

    Raises:
        ValueError: It is not a quantity; the message says what to write.

    """
    match = _QUANTITY.fullmatch(quantity)
    if match is None:
        raise ValueError(f"'{quantity}' is not an amount of memory; write a number and a unit, as in 24Gi or 80G")
    size = float(match[1]) * (_UNITS | _BINARY)[match[2] or ""]
    if not isfinite(size):
        raise ValueError(f"'{quantity[:20]}…' is too large; write a number and a unit, as in 24Gi or 80G")
    return int(size)


def parse_cores(quantity: str) -> float:
    """Return an amount of CPU, such as 2 or 7910m, in cores.

    Raises:
        ValueError: It is not an amount of CPU.

    """
    if quantity.endswith("m"):
        return parse_quantity(quantity.removesuffix("m")) / _MILLI
    return float(quantity) if _QUANTITY.fullmatch(quantity) and quantity[-1].isdigit() else parse_quantity(quantity)
