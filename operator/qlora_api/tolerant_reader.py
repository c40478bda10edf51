"""Reads documents that another version wrote: unknown fields are ignored, and each is logged once per process.

What people write is read strictly, by the models themselves. What pods and buckets contain is read with
`ignore_unknown`: known fields are validated as always. Only what the API server has stored, and so has validated, is
read with `read_stored`, which also keeps values beyond the bounds of this version, and leaves out what it cannot read.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Final, Generic, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from qlora_api.escapes import escape_line

_log = logging.getLogger(__name__)

Model = TypeVar("Model", bound=BaseModel)
_SHOWN_FIELDS: Final = 5
_SHOWN_CHARACTERS: Final = 300
"""Characters of field names in a log line: a pod chooses them."""
_KINDS_OF_WARNINGS: Final = 256
"""Different log lines that are remembered, so as not to be repeated."""
_logged: Final[dict[tuple[str, str], None]] = {}
"""Kinds and fields of the warnings so far, oldest first."""
_MAX_ERRORS: Final = 1000
"""Errors that are looked at: a file can have millions of unknown fields, and each error takes memory."""
_TOO_MANY: Final = f"more than {_MAX_ERRORS}"
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
    validate = model.model_validate_json if isinstance(document, (str, bytes)) else model.model_validate
    try:
        return validate(document)  # type: ignore[arg-type]
    except ValidationError as error:
        unknown = unknown_fields(_errors(error)) if error.error_count() <= _MAX_ERRORS else _TOO_MANY
    value = validate(document, extra="ignore")  # type: ignore[arg-type]
    _log_unknown(model.__name__, unknown, source)
    return value


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
    paths = [
        ".".join("*" if isinstance(part, int) else part for part in error["loc"])
        for error in errors
        if error["type"] == _UNKNOWN_FIELD
    ]
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
