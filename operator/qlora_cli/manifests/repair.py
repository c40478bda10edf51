"""Checks the rules between fields of a manifest that has wrong fields too, so that one pass finds everything.

Wrong fields are replaced by their defaults; a rule that reads one of them says nothing, because it would judge a value
that nobody wrote.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, Protocol, cast

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from qlora_api import names
from qlora_api.v1alpha1 import QLoRAJobSpec
from qlora_cli.manifests.synonyms import synonym_of
from qlora_planner.validation import Rule

Location = tuple[str | int, ...]
_PLACEHOLDERS: Final[dict[Location, Any]] = {
    ("apiVersion",): names.API_VERSION,
    ("kind",): names.KIND,
    ("metadata",): {"name": "name"},
    ("metadata", "name"): "name",
    ("spec",): {},
    ("spec", "model"): {"uri": "hf://organization/name"},
    ("spec", "model", "uri"): "hf://organization/name",
    ("spec", "dataset"): {"uri": "s3://bucket/file"},
    ("spec", "output"): {"uri": "s3://bucket/prefix"},
    ("spec", "output", "uri"): "s3://bucket/prefix",
}
"""Values of required fields; any other block with a missing field is left out."""
MAX_ROUNDS: Final = 8
"""Times that a manifest is parsed; one round removes the wrong fields, the next what is missing then."""


class Parsed(Protocol):
    """A manifest."""

    @property
    def spec(self) -> QLoRAJobSpec:
        """Return the spec."""


def check_repaired(
    value: Any, details: Iterable[ErrorDetails], rules: Iterable[Rule], parse: Callable[[Any], Parsed]
) -> list[str]:
    """Return the messages of the rules that read no wrong field.

    Args:
        value: The manifest.
        details: What pydantic found.
        rules: Rules between fields.
        parse: Parses a manifest; raises ValidationError.

    """
    if not isinstance(value, dict):
        return []
    value, wrong = copy.deepcopy(value), set[Location]()
    for _ in range(MAX_ROUNDS):
        for detail in details:
            wrong.update(_repair(value, detail))
        try:
            spec = parse(value).spec
        except ValidationError as error:
            details = error.errors(include_url=False)
        else:
            return [message for rule in rules if (message := _check(rule, spec, wrong))]
    return []


def _repair(value: dict[str, Any], detail: ErrorDetails) -> Iterator[Location]:
    """Replace a wrong field, and yield the locations whose values nobody wrote."""
    location = _before_index(detail["loc"])
    yield location
    if detail["type"] == "extra_forbidden" and location:
        synonym = synonym_of(str(location[-2]) if len(location) > 1 else "", str(location[-1]))
        if synonym and synonym.field:
            yield tuple(synonym.field.split("."))
    if detail["type"] == "missing" and location not in _PLACEHOLDERS:
        location = location[:-1]
        yield location
    parent = _mapping_at(value, location[:-1])
    if parent is None or not location:
        return
    if location in _PLACEHOLDERS:
        parent[str(location[-1])] = copy.deepcopy(_PLACEHOLDERS[location])
    else:
        parent.pop(str(location[-1]), None)


def _before_index(location: Location) -> Location:
    """Return the location of the list or map in which an entry is wrong."""
    for depth, part in enumerate(location):
        if isinstance(part, int) or part == "[key]":
            return location[: depth - (part == "[key]")]
    return location


def _mapping_at(value: Any, location: Location) -> dict[str, Any] | None:
    for part in location:
        value = value.get(part) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else None


def _check(rule: Rule, spec: QLoRAJobSpec, wrong: set[Location]) -> str | None:
    read: set[Location] = set()
    message = rule(cast("QLoRAJobSpec", _Recorder(spec, ("spec",), read)))
    return None if any(_overlap(one, other) for one in read for other in wrong) else message


def _overlap(one: Location, other: Location) -> bool:
    shorter = min(len(one), len(other))
    return one[:shorter] == other[:shorter]


class _Recorder:
    """Stands for a block of the spec, and records which fields are read."""

    def __init__(self, block: BaseModel, location: Location, read: set[Location]) -> None:
        self._block, self._location, self._read = block, location, read

    def __getattr__(self, name: str) -> Any:
        kind = type(self._block)
        if isinstance(attribute := getattr(kind, name, None), property) and attribute.fget:
            return attribute.fget(self)
        value = getattr(self._block, name)
        field = kind.model_fields.get(name)
        location = (*self._location, (field.alias or name) if field else name)
        if isinstance(value, BaseModel):
            return _Recorder(value, location, self._read)
        self._read.add(location)
        return value
