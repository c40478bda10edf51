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

from qlora_api import names
from qlora_api.escapes import escape_line
from qlora_cli.manifests.shorthands import (
    line_to_write,
    list_to_write,
    number_to_write,
    text_to_write,
    to_yaml_value,
    unresolved,
    uri_to_write,
)
from qlora_cli.manifests.synonyms import VALUES, Synonym, spelling, synonym_of

Location = tuple[str | int, ...]
_PATTERN_CHARACTERS: Final = frozenset("*^$|()[]\\+?")
_PART: Final = re.compile(r"\[[0-9]+\]|[^.\[]+")

SHOWN_CHARACTERS: Final = 60
"""Maximum characters of a wrong value in a message."""

SHOWN_PATHS: Final = 3
"""Maximum fields of the same name that are suggested."""
_FIXED: Final = {"apiVersion": names.API_VERSION, "kind": names.KIND}
_BOOLEANS: Final = {"true": "true", "yes": "true", "on": "true", "1": "true", "false": "false", "no": "false"} | {
    "off": "false", "0": "false"
}  # fmt: skip

_SENTENCES: Final = {
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
    field: str = ""
    """Path of the field."""

    def __str__(self) -> str:
        return escape_line(f"{self.position}: {self.message}")


def write_location(location: Location) -> str:
    """Format ('spec', 'lora', 'targets', 0) as `spec.lora.targets[0]`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(".")


def read_location(path: str) -> Location:
    """Parse what `write_location` formats."""
    return tuple(int(part[1:-1]) if part.startswith("[") else part for part in _PART.findall(path))


def describe_error(detail: ErrorDetails, root: type[BaseModel]) -> str:
    """Return what is wrong with a field and how to fix it, in one clause."""
    location, kind, given = detail["loc"], detail["type"], detail["input"]
    if kind == "extra_forbidden":
        return f"unknown field{_suggestion(location, given, root)}"
    if kind == "missing":
        example = _example_line(location, root)
        return f"is required; write {location[-1]}: {example}" if example else "is required"
    if given is None:
        example = _example_line(location, root)
        wanted = f"write {location[-1]}: {example}, or remove the line" if example else "remove the line"
        return f"has no value; {wanted}; fields of a block are indented below it"
    return _describe_value(detail, root)


def _describe_value(detail: ErrorDetails, root: type[BaseModel]) -> str:
    location, kind, given = detail["loc"], detail["type"], detail["input"]
    value = _shorten(given)
    if hint := unresolved(given):
        return f"{hint}, got {value}"
    if kind == "string_pattern_mismatch":
        if location[-1] == "uri":
            return f"{uri_to_write(write_location(location), given)}, got {value}"
        example = _example(location, root) or detail["ctx"]["pattern"]
        hint = "; patterns are not supported, write each name" if _is_pattern(location, given) else ""
        return f"must look like {example}, got {value}{hint}"
    sentence = _SENTENCES.get(kind)
    cause = sentence.format(value=value, **detail.get("ctx", {})) if sentence else detail["msg"]
    fix = _fix(kind, location, given, detail)
    return f"{cause}; {fix}" if fix else cause


def _fix(kind: str, location: Location, value: Any, detail: ErrorDetails) -> str | None:
    """Return what to write instead of a value of the wrong type or outside a list of values."""
    name, path = str(location[-1]) if location else "", write_location(location)
    if kind in {"literal_error", "enum"}:
        known = re.findall(r"'([^']*)'", detail["ctx"]["expected"]) or re.findall(r"\w+", detail["ctx"]["expected"])
        alike = _similar_value(name, str(value).lower() if isinstance(value, bool) else str(value), known)
        return f"did you mean {alike}?" if alike else None
    if kind in {"int_type", "int_parsing", "float_type", "bool_type"}:
        number = number_to_write(value) if kind != "bool_type" else _BOOLEANS.get(str(value).lower())
        return f"write {number}, without quotes" if number else None
    wanted = None
    if location and kind in {"model_type", "dict_type", "model_attributes_type"}:
        wanted = line_to_write(location, path, value)
    elif kind == "tuple_type":
        wanted = list_to_write(name, value)
    elif kind == "string_type":
        wanted = text_to_write(name, value)
    return f"write {wanted}" if wanted else None


def _similar_value(name: str, value: str, known: list[str]) -> str | None:
    spellings = {spelling(one): one for one in known}
    other = VALUES.get(name, {}).get(spelling(value))
    if other in known:
        return other
    alike = difflib.get_close_matches(spelling(value), spellings, n=1)
    return spellings[alike[0]] if alike else None


def _is_pattern(location: Location, value: Any) -> bool:
    """Return whether an entry of a list of names is meant as a wildcard or a regular expression."""
    return isinstance(location[-1], int) and isinstance(value, str) and not _PATTERN_CHARACTERS.isdisjoint(value)


def _shorten(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 1]}…"


def target_of_unknown(location: Location, root: type[BaseModel]) -> str | None:
    """Return the path of the field that an unknown one probably stands for."""
    synonym = _synonym(location, root)
    if synonym is not None:
        return synonym.field
    alike = _similar_sibling(location, root)
    return write_location((*location[:-1], alike)) if alike else None


def _synonym(location: Location, root: type[BaseModel]) -> Synonym | None:
    """Return a synonym of another tool, unless a sibling is only spelled in another way."""
    name, parent = str(location[-1]), _model_at(location[:-1], root)
    if parent and spelling(name) in {spelling(field) for field in _fields(parent)}:
        return None
    block = next((str(part) for part in reversed(location[:-1]) if isinstance(part, str)), "")
    return synonym_of(block, name)


def _similar_sibling(location: Location, root: type[BaseModel]) -> str | None:
    name, parent = str(location[-1]), _model_at(location[:-1], root)
    siblings = {spelling(field): field for field in _fields(parent)} if parent else {}
    longer = [known for known in siblings if known.startswith(spelling(name))]
    alike = longer or difflib.get_close_matches(spelling(name), siblings, n=1)
    return siblings[alike[0]] if alike else None


def _suggestion(location: Location, value: Any, root: type[BaseModel]) -> str:
    """Suggest the field of a synonym, a sibling with a similar name, or a field of the same name elsewhere."""
    name, parent = str(location[-1]), _model_at(location[:-1], root)
    if synonym := _synonym(location, root):
        return f"; {_write_synonym(synonym, value)}"
    if "." in name and field_at((*location[:-1], *name.split(".")), root):
        *blocks, last = name.split(".")
        return f"; write {': {'.join(blocks)}: {{{last}: {to_yaml_value(value)}{'}' * len(blocks)}"
    if alike := _similar_sibling(location, root):
        return f"; did you mean {alike}?"
    elsewhere = [".".join(path) for path in _paths(root) if spelling(path[-1]) == spelling(name)]
    if elsewhere:
        return f"; did you mean {' or '.join(elsewhere[:SHOWN_PATHS])}?"
    return f"; known are {', '.join(_fields(parent))}" if parent else ""


def _write_synonym(synonym: Synonym, value: Any) -> str:
    if synonym.field is None:
        return synonym.note
    if synonym.same_value and isinstance(value, (bool, int, float, str, list)):
        line = f"write {synonym.field}: {to_yaml_value(value)}"
        return f"{line}, {synonym.note}" if synonym.note else line
    return f"here it is {synonym.field}: {synonym.note}"


def _example_line(location: Location, root: type[BaseModel]) -> str | None:
    """Return a value to write for a field that is missing: its example, or the example of its first field."""
    if example := _FIXED.get(write_location(location)) or _example(location, root):
        return example
    field = field_at(location, root)
    model = _nested(field.annotation) if field else None
    for name, child in _fields(model).items() if model else ():
        if child.examples or child.is_required():
            return f"{{{name}: {_example((*location, name), root) or name.upper()}}}"
    return None


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
