"""JSON from outside, such as a model's config.json: bounded in size and nesting, and an object."""

import json
from typing import Any, Final

MAX_NESTING: Final = 100
"""Levels of lists and objects, the same as Arrow's limit for a Parquet schema; tool schemas have about ten."""


MAX_VALUES: Final = 3_000_000
"""Values of a JSON text: empty lists take 24 times their text. A report of 100,000 steps has 700,000."""


class InvalidJsonError(ValueError):
    """The text is no JSON, or no object, within the bounds; the message says why, to be put after its name."""


def is_nested_deeper(value: Any, levels: int = MAX_NESTING) -> bool:
    """Return whether lists and objects are nested in more than so many levels."""
    nested = [value] if isinstance(value, (dict, list)) else []
    for _ in range(levels):
        children = (child for parent in nested for child in (parent.values() if isinstance(parent, dict) else parent))
        nested = [child for child in children if isinstance(child, (dict, list))]
        if not nested:
            return False
    return True


class TooManyValuesError(InvalidJsonError):
    """The text has so many values that they would take all memory."""


def check_values(content: str | bytes, start: int = 0, maximum: int = MAX_VALUES) -> None:
    """Raise TooManyValuesError if a JSON text may have too many values; signs in its strings count as well.

    Args:
        content: JSON, or the start of one.
        start: Where it begins in the text.
        maximum: Maximum number of values.

    """
    if len(content) - start <= maximum:
        return
    if isinstance(content, str):
        count = sum(content.count(sign, start) for sign in "[{,")
    else:
        count = sum(content.count(sign, start) for sign in (b"[", b"{", b","))
    if count > maximum:
        raise TooManyValuesError(f"has more than {maximum:,} values")


def parse_json(content: str | bytes) -> Any:
    """Parse JSON whose size the caller has bounded, or raise InvalidJsonError."""
    check_values(content)
    try:
        return json.loads(content)
    except RecursionError as error:
        raise InvalidJsonError(f"is nested in more than {MAX_NESTING} levels") from error
    except ValueError as error:
        raise InvalidJsonError(f"is not JSON: {error}") from error


def parse_object(content: str | bytes, max_bytes: int) -> dict[str, Any]:
    """Parse a JSON object.

    Args:
        content: The JSON; of a longer file, `max_bytes` + 1 bytes are enough.
        max_bytes: Maximum length.

    Raises:
        InvalidJsonError: It is longer, not JSON, nested too deeply or not an object.

    """
    if len(content) > max_bytes:
        raise InvalidJsonError(f"has more than {max_bytes:,} bytes")
    value = parse_json(content)
    if not isinstance(value, dict):
        raise InvalidJsonError("is not a JSON object")
    if is_nested_deeper(value):
        raise InvalidJsonError(f"is nested in more than {MAX_NESTING} levels")
    return value
