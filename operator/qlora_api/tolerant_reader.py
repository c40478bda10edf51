"""Reads documents that another version wrote: unknown fields are ignored, and each is logged once per process.

What people write is read strictly, by the models themselves. What pods and buckets contain is read with
`ignore_unknown`: known fields are validated as always, up to the first invalid item of each list. Only what the API
server has stored, and so has validated, is read with `read_stored`, which also keeps values beyond the bounds of this
version, and leaves out what it cannot read.
"""

import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Annotated, Any, Final, Generic, TypeVar, get_args, get_origin

from pydantic import AfterValidator, BaseModel, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails, SchemaValidator

from qlora_api.escapes import escape_line
from qlora_api.untrusted_json import InvalidJsonError, parse_json

_log = logging.getLogger(__name__)

Model = TypeVar("Model", bound=BaseModel)
_SHOWN_FIELDS: Final = 5
_SHOWN_CHARACTERS: Final = 300
"""Characters of field names in a log line: a pod chooses them."""
_KINDS_OF_WARNINGS: Final = 256
"""Different log lines that are remembered, so as not to be repeated."""
_logged: Final[dict[tuple[str, str], None]] = {}
"""Kinds and fields of the warnings so far, oldest first."""
_MAX_UNKNOWN: Final = 1000
"""Unknown fields that are counted: a file can have millions."""
_TOO_MANY: Final = f"more than {_MAX_UNKNOWN}"
_COLLECTIONS: Final = frozenset({"dict", "frozenset", "list", "set", "tuple"})
"""Types of pydantic's schemas with items, each of which can be invalid."""
_HALF_CHARACTER: Final = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")
"""What half a character, which has no UTF-8 form, can be written as; Python's parser accepts it, pydantic's did not."""
_UNKNOWN_FIELD: Final = "extra_forbidden"
_BEYOND_BOUNDS: Final = frozenset(
    {
        "greater_than",
        "greater_than_equal",
        "less_than",
        "less_than_equal",
        "string_pattern_mismatch",
        "string_too_long",
        "string_too_short",
        "value_error",
    }
)
"""Errors of pydantic for a value of the right type that this version would refuse at creation."""


def ignore_unknown(model: type[Model], document: str | bytes | Mapping[str, Any], source: str) -> Model:
    """Parse JSON or a mapping; unknown fields are logged and ignored.

    Args:
        model: The model of this version.
        document: What another version may have written.
        source: What it is, for the log.

    Raises:
        ValidationError: A known field is missing or invalid.

    """
    content = _parse(model, document) if isinstance(document, (str, bytes)) else document
    value: Model = _validator(model).validate_python(content, extra="ignore")
    unknown = list(islice(_unknown_paths(model, content), _MAX_UNKNOWN + 1))
    _log_unknown(model.__name__, _shown(unknown) if len(unknown) <= _MAX_UNKNOWN else _TOO_MANY, source)
    return value


def _parse(model: type[BaseModel], document: str | bytes) -> Any:
    """Parse JSON with Python's own parser: pydantic's takes 500 times the size of a text of empty lists."""
    try:
        text = document if isinstance(document, str) else document.decode()
        value = parse_json(text)
        if _HALF_CHARACTER.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except (InvalidJsonError, UnicodeError) as error:
        cause = {"type": "json_invalid", "loc": (), "input": "", "ctx": {"error": str(error.__cause__ or error)}}
        raise ValidationError.from_exception_data(model.__name__, [cause], "json") from error  # type: ignore[list-item]
    return value


@cache
def _validator(model: type[BaseModel]) -> SchemaValidator:
    """Return a validator with at most one error for each field of the models: a file can have millions of items."""
    # Without the validators that the nested models have already built, which report each item.
    return SchemaValidator(_failing_fast(model.__pydantic_core_schema__), _use_prebuilt=False)


def _failing_fast(schema: Any) -> Any:
    """Return a schema of pydantic whose lists and mappings end at their first invalid item."""
    if isinstance(schema, (list, tuple)):
        return type(schema)(map(_failing_fast, schema))
    if not isinstance(schema, dict):
        return schema
    found = {name: _failing_fast(part) for name, part in schema.items()}
    kind = schema.get("type")  # a schema of its own if a model has a field of this name
    return found | {"fail_fast": True} if isinstance(kind, str) and kind in _COLLECTIONS else found


def _unknown_paths(kind: Any, value: object, path: str = "") -> Iterator[str]:
    """Yield the paths of the fields that a type, such as `tuple[Attempt, ...] | None`, does not have."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield from _unknown_fields_of(kind, value, path)
    elif isinstance(value, (list, tuple)):
        for item in value:
            for part in get_args(kind):
                yield from _unknown_paths(part, item, f"{path}*.")
    elif isinstance(value, Mapping) and get_origin(kind) is dict:
        for name, item in value.items():
            yield from _unknown_paths(get_args(kind)[1], item, f"{path}{name}.")
    elif isinstance(value, Mapping):
        for part in get_args(kind):
            yield from _unknown_paths(part, value, path)


def _unknown_fields_of(model: type[BaseModel], value: object, path: str) -> Iterator[str]:
    fields = {known: field for name, field in model.model_fields.items() for known in (name, field.alias or name)}
    for name, item in value.items() if isinstance(value, Mapping) else ():
        if name not in fields:
            yield f"{path}{name}"
        elif isinstance(item, (list, tuple, Mapping)):
            yield from _unknown_paths(fields[name].annotation, item, f"{path}{name}.")


@dataclass(frozen=True)
class Stored(Generic[Model]):
    """A stored object, as far as this version can read it."""

    value: Model | None
    """None if a required field cannot be read."""
    invalid: tuple[ErrorDetails, ...] = ()
    """Why this version would refuse it at creation; unknown fields are not listed."""
    unreadable: tuple[str, ...] = ()
    """Paths of the fields that were left out, because their type or word is unknown."""
    unknown: str = ""
    """Unknown fields, for a message; empty if there are none."""


def read_stored(model: type[Model], document: Mapping[str, Any], source: str) -> Stored[Model]:
    """Read as much as possible of a mapping that the API server has validated, by the CRD of some version."""
    try:
        return Stored(model.model_validate(document))
    except ValidationError as error:
        errors = _errors(error)
    unknown = unknown_fields(errors)
    _log_unknown(model.__name__, unknown, source)
    invalid = tuple(error for error in errors if error["type"] != _UNKNOWN_FIELD)
    if not invalid:
        return Stored(model.model_validate(document, extra="ignore"), unknown=unknown)
    unreadable: list[str] = []
    return Stored(_read_fields(model, document, "", unreadable), invalid, tuple(unreadable), unknown)


def _read_fields(model: type[Model], document: object, path: str, unreadable: list[str]) -> Model | None:
    """Return the model without the fields that cannot be read; None if one of them is required."""
    if not isinstance(document, Mapping):
        return None
    values: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        alias = field.alias or name
        if alias not in document:
            if field.is_required():
                return None
            continue
        found: list[str] = []
        value, readable = _read_field(model, name, document[alias], f"{path}{alias}", found)
        unreadable.extend(found)
        if readable:
            values[name] = value
        elif field.is_required():
            return None
    return model.model_construct(**values)


def _read_field(
    model: type[BaseModel], name: str, value: object, path: str, unreadable: list[str]
) -> tuple[object, bool]:
    """Return the value of one field, and whether it can be read."""
    field = model.model_fields[name]
    try:
        return _adapter(model, name).validate_python(value, extra="ignore"), True
    except ValidationError as error:
        kinds = {detail["type"] for detail in _errors(error)}
    nested = next(_nested_models(field.annotation), None)
    if nested is not None and isinstance(value, (list, tuple)):
        items = [_read_fields(nested, item, f"{path}.{index}.", unreadable) for index, item in enumerate(value)]
        unreadable.extend(f"{path}.{index}" for index, item in enumerate(items) if item is None)
        return tuple(item for item in items if item is not None), True
    if nested is not None and (found := _read_fields(nested, value, f"{path}.", unreadable)) is not None:
        return found, True
    if kinds <= _BEYOND_BOUNDS and isinstance(value, (str, int, float)) and not _is_parsed_further(field):
        return value, True
    unreadable.append(path)
    return None, False


@cache
def _adapter(model: type[BaseModel], name: str) -> TypeAdapter[Any]:
    field = model.model_fields[name]
    kind: Any = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
    return TypeAdapter(kind)


def _nested_models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the models in an annotation such as `tuple[Attempt, ...]` or `Plan | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _nested_models(argument)


def _is_parsed_further(annotation: Any) -> bool:
    """Return whether the text of a field is parsed after its validation, as a duration is, so that it must be valid."""
    metadata: Iterable[object] = getattr(annotation, "metadata", ()) or getattr(annotation, "__metadata__", ())
    inner = getattr(annotation, "annotation", annotation)
    return any(isinstance(item, AfterValidator) for item in metadata) or any(map(_is_parsed_further, get_args(inner)))


def unknown_fields(errors: Iterable[ErrorDetails]) -> str:
    """Return the paths of unknown fields, for a message; empty if there are none."""
    return _shown(
        ".".join("*" if isinstance(part, int) else part for part in error["loc"])
        for error in errors
        if error["type"] == _UNKNOWN_FIELD
    )


def _shown(paths: Iterable[str]) -> str:
    shown = list(dict.fromkeys(paths))
    more = f" and {len(shown) - _SHOWN_FIELDS} more" if len(shown) > _SHOWN_FIELDS else ""
    return escape_line(", ".join(shown[:_SHOWN_FIELDS]))[:_SHOWN_CHARACTERS] + more


def _errors(error: ValidationError) -> list[ErrorDetails]:
    return error.errors(include_url=False, include_context=False, include_input=False)


def _log_unknown(kind: str, fields: str, source: str) -> None:
    """Log unknown fields, once for every kind of document and not for each of ten thousand objects."""
    if fields and _is_new(kind, fields):
        _log.warning(
            "%s: fields that this version does not know are ignored, here and in others alike: %s", source, fields
        )


def _is_new(kind: str, fields: str) -> bool:
    if (kind, fields) in _logged:
        return False
    if len(_logged) >= _KINDS_OF_WARNINGS:
        del _logged[next(iter(_logged))]
    _logged[kind, fields] = None
    return True
