"""Reads objects that others wrote one at a time: one that cannot be read is skipped with a single warning.

Whoever may create a Job in one namespace decides what is in its labels; that must not stop the operator for all others.
"""

import logging
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Final, TypeVar

from pydantic import ConfigDict, create_model

from qlora_api.escapes import escape_line
from qlora_operator.models import ChildJob, Pod, RawClass, RawJob, Workload

_log = logging.getLogger(__name__)

Value = TypeVar("Value")
Checked = TypeVar("Checked", ChildJob, Pod, RawClass, RawJob, Workload)

PARSE_ERRORS: Final = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What code raises that expects another type, another field or another spelling."""
MAX_WARNINGS: Final = 1024
"""Versions of unreadable objects that are remembered as reported."""
MAX_REASON: Final = 200
"""Longest reason in a warning."""


def _strict_model(kind: type) -> Any:
    return create_model(kind.__name__, __config__=_STRICT, value=(kind, ...))


_STRICT: Final = ConfigDict(revalidate_instances="always", strict=True)
_STRICT_MODELS: Final = {kind: _strict_model(kind) for kind in (ChildJob, Pod, RawClass, RawJob, Workload)}
"""Models that check the type of every field of a value, also inside of it."""


def check_types(value: Checked) -> Checked:
    """Return the value; ValueError if a field of it has another type than declared."""
    _STRICT_MODELS[type(value)].model_validate({"value": value})
    return value


def parse_or_skip(kind: str, parse: Callable[[Any], Value], item: Any) -> Value | None:
    """Return the parsed object; None, with one warning for each version of it, if it cannot be read."""
    try:
        return parse(item)
    except PARSE_ERRORS as error:
        _warn_once(kind, _identity(item), f"{type(error).__name__}: {escape_line(str(error))}"[:MAX_REASON])
        return None


def _identity(item: Any) -> tuple[str, ...]:
    """Return namespace, name, uid and resourceVersion as text, whatever the object looks like."""
    metadata = item.get("metadata") if isinstance(item, Mapping) else None
    fields = metadata if isinstance(metadata, Mapping) else {}
    values = (fields.get(key) for key in ("namespace", "name", "uid", "resourceVersion"))
    return tuple(escape_line(value)[:253] if isinstance(value, str) else "?" for value in values)


@lru_cache(maxsize=MAX_WARNINGS)
def _warn_once(kind: str, identity: tuple[str, ...], reason: str) -> None:
    namespace, name, uid, version = identity
    _log.warning(
        "%s %s/%s (uid %s, version %s) cannot be read, and is ignored: %s", kind, namespace, name, uid, version, reason
    )
