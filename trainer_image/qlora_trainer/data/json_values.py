"""Nested values of a row: JSON in text, nulls that a columnar file adds, and text that is not valid Unicode."""

import json
from collections.abc import Iterator
from typing import Any

from qlora_api.untrusted_json import MAX_NESTING, TooManyValuesError, check_values, is_nested_deeper
from qlora_trainer.data.rows import RowError


def parse_json_text(text: str, label: str) -> Any:
    """Parse JSON that a row holds as text, or raise RowError that names the field."""
    try:
        check_values(text)
        value = json.loads(text)
    except RecursionError as error:
        raise RowError(f"{label} is nested in more than {MAX_NESTING} levels; write a flat object") from error
    except TooManyValuesError as error:
        raise RowError(f"{label} {error}; write fewer") from error
    except ValueError as error:
        raise RowError(f"{label} is text, but not JSON ({error}); write JSON, such as json.dumps does") from error
    if is_nested_deeper(value):
        raise RowError(f"{label} is nested in more than {MAX_NESTING} levels; write a flat object")
    return value


def without_nulls(value: Any) -> Any:
    """Return a value without the null fields of its objects: Arrow gives each struct the fields of all others."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def has_text(value: Any) -> bool:
    """Return whether a value contains text, at any depth; numbers and flags beside a message are no text."""
    return any(text.strip() for _, text in _texts(value, ""))


def check_unicode(value: Any, label: str) -> None:
    """Raise RowError if a text, at any depth, is not valid Unicode."""
    for where, text in _texts(value, label):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RowError(
                f"{where} contains bytes that are not UTF-8, or half a character; save the file as UTF-8"
            ) from error


def _texts(value: Any, label: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield label, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield label, str(key)
            yield from _texts(item, f"{label}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _texts(item, f"{label}[{index}]")
