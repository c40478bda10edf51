"""The base classes of the models of the contract: camelCase on the wire, no unknown fields, immutable."""

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Final, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.alias_generators import to_camel

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
MAX_INTEGER: Final = 2**53
"""Larger integers are not exact in JSON (RFC 8259, section 6); the API server stores at most 2**63 - 1."""


class ApiModel(BaseModel):
    """Base class: frozen, camelCase in JSON, unknown fields are errors."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="forbid", frozen=True)


class ReportedModel(ApiModel):
    """Base class of what pods and buckets contain: every number is finite, and no integer exceeds MAX_INTEGER."""

    @model_validator(mode="after")
    def _check_numbers(self) -> Self:
        check_numbers(self.model_dump())
        return self


def check_numbers(value: Any) -> None:
    """Raise ValueError if a number in nested lists and mappings is not finite, or an integer above MAX_INTEGER."""
    for number in _numbers(value):
        if isinstance(number, int) and abs(number) > MAX_INTEGER:
            raise ValueError("an integer is above 2**53")
        if not math.isfinite(number):
            raise ValueError(f"{number} is not a finite number")


def _numbers(value: Any) -> Iterator[int | float]:
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, (int, float)):
        yield value
