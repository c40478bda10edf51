"""Turns pydantic's errors into messages for authors of manifests."""

import difflib
import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticUndefined

from qlora_api.escapes import escape_line

Location = tuple[str | int, ...]
_PATTERN_CHARACTERS: Final = frozenset("*^$|()[]\\+?")
_PART: Final = re.compile(r"\[[0-9]+\]|[^.\[]+")

SHOWN_CHARACTERS: Final = 60
"""Maximum characters of a wrong value in a message."""

_SENTENCES: Final = {
    "missing": "is required",
    "greater_than_equal": "must be ≥ {ge:g}, got {value}",
    "greater_than": "must be > {gt:g}, got {value}",
    "less_than_equal": "must be ≤ {le:g}, got {value}",
    "less_than": "must be < {lt:g}, got {value}",
    "literal_error": "must be {expected}, got {value}",
    "enum": "must be {expected}, got {value}",
    "int_type": "must be an integer, got {value}",
    "int_from_float": "must be an integer, got {value}",
    "float_type": "must be a number, got {value}",
    "string_type": "must be a string, got {value}",
    "bool_type": "must be true or false, got {value}",
    "model_type": "must be a mapping of fields, got {value}",
    "dict_type": "must be a mapping, got {value}",
    "tuple_type": "must be a list, got {value}",
    "too_short": "must have {min_length} or more entries, got {value}",
    "too_long": "may have {max_length} entries, got {actual_length}",
    "string_too_short": "must have at least {min_length} characters, got {value}",
    "string_too_long": "may have {max_length} characters",
    "value_error": "{error}, got {value}",
}
"""Messages by pydantic's error type; all other types keep pydantic's own message."""


@dataclass(frozen=True)
class Problem:
    """One problem: its position in the file, and the field with the fix."""

    position: str
    message: str

    def __str__(self) -> str:
        return escape_line(f"{self.position}: {self.message}")


def write_location(location: Location) -> str:
    """Format ('spec', 'lora', 'targets', 0) as `spec.lora.targets[0]`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(".")


def read_location(path: str) -> Location:
    """Parse what `write_location` formats."""
    return tuple(int(part[1:-1]) if part.startswith("[") else part for part in _PART.findall(path))


def describe_error(detail: ErrorDetails, root: type[BaseModel]) -> str:
    """Return what is wrong with a field, in one clause."""
    location, kind = detail["loc"], detail["type"]
    value = _shorten(detail["input"])
    if kind == "extra_forbidden":
        return f"unknown field{_suggestion(location, root)}"
    if kind == "string_pattern_mismatch":
        example = _example(location, root) or detail["ctx"]["pattern"]
        hint = "; patterns are not supported, write each name" if _is_pattern(location, detail["input"]) else ""
        return f"must look like {example}, got {value}{hint}"
    sentence = _SENTENCES.get(kind)
    return sentence.format(value=value, **detail.get("ctx", {})) if sentence else detail["msg"]


def _is_pattern(location: Location, value: Any) -> bool:
    """Return whether an entry of a list of names is meant as a wildcard or a regular expression."""
    return isinstance(location[-1], int) and isinstance(value, str) and not _PATTERN_CHARACTERS.isdisjoint(value)


def _shorten(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 1]}…"


def _suggestion(location: Location, root: type[BaseModel]) -> str:
    """Suggest a sibling with a similar name, or else a field of the same name elsewhere."""
    name, parent = str(location[-1]), _model_at(location[:-1], root)
    siblings = {_spelling(field): field for field in _fields(parent)} if parent else {}
    longer = [spelling for spelling in siblings if spelling.startswith(_spelling(name))]
    if alike := longer or difflib.get_close_matches(_spelling(name), siblings, n=1):
        return f"; did you mean {siblings[alike[0]]}?"
    if elsewhere := next((path for path in _paths(root) if _spelling(path[-1]) == _spelling(name)), None):
        return f"; did you mean {'.'.join(elsewhere)}?"
    return f"; known are {', '.join(siblings.values())}" if siblings else ""


def _spelling(name: str) -> str:
    return name.lower().replace("_", "")


def _fields(model: type[BaseModel]) -> dict[str, FieldInfo]:
    return {field.alias or name: field for name, field in model.model_fields.items()}


def _nested(annotation: Any) -> type[BaseModel] | None:
    """Return the model inside an annotation such as SecretRef | None."""
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for part in get_args(annotation) if (model := _nested(part))), None)


def _model_at(location: Location, model: type[BaseModel] | None) -> type[BaseModel] | None:
    for part in location:
        if model is None:
            return None
        if isinstance(part, str):
            field = _fields(model).get(part)
            model = _nested(field.annotation) if field else None
    return model


def _paths(model: type[BaseModel], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, field in _fields(model).items():
        yield (*prefix, name)
        if child := _nested(field.annotation):
            yield from _paths(child, (*prefix, name))


def field_at(location: Location, root: type[BaseModel]) -> FieldInfo | None:
    """Return pydantic's definition of a field, by its path."""
    parent = _model_at(location[:-1], root)
    return _fields(parent).get(str(location[-1])) if parent else None


def _example(location: Location, root: type[BaseModel]) -> str | None:
    """Return a valid value: the field's example, or its default; for an entry of a list, the first entry of these."""
    is_entry = isinstance(location[-1], int)
    field = field_at(location[:-1] if is_entry else location, root)
    if field is None:
        return None
    value = field.examples[0] if field.examples else field.default
    if is_entry:
        return str(value[0]) if isinstance(value, (list, tuple)) and value else None
    return None if value in (None, "", PydanticUndefined) else str(value)
