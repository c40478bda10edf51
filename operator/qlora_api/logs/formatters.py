"""The log format of operator and trainer: one JSON object per line, or text for a terminal (docs/logs.md)."""

import json
import logging
import os
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Final, TextIO

from qlora_api.logs.redaction import REDACTOR

FORMAT_ENV: Final = "QLORA_LOG_FORMAT"
"""Environment variable with a Format, of the operator and of the trainer."""


class Format(StrEnum):
    """Format of log lines."""

    JSON = "json"
    TEXT = "text"


_NOTHING: Final[Mapping[str, object]] = MappingProxyType({})
_task: ContextVar[Mapping[str, object]] = ContextVar("fields of log lines", default=_NOTHING)
_process: dict[str, object] = {}


def log_fields(**values: object) -> dict[str, object]:
    """Return the `extra` argument of a log call that adds these fields to its line."""
    return {"fields": values}


def bind_task_fields(**values: object) -> None:
    """Add fields to every further line of the current asyncio task; the next call replaces them."""
    _task.set(MappingProxyType(values))


def bind_process_fields(**values: object) -> None:
    """Add fields to every further line of this process, whichever thread writes it."""
    _process.update(values)


def record_to_dict(record: logging.LogRecord) -> dict[str, Any]:
    """Return the fields of a record with secrets redacted; time, level, logger and message are never overwritten."""
    entry: dict[str, Any] = {
        "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "level": record.levelname.lower(),
        "logger": record.name,
        "message": record.getMessage(),
    }
    for more in (_process, _task.get(), getattr(record, "fields", _NOTHING)):
        for name, value in more.items():
            entry.setdefault(name, value)
    if record.exc_info:
        entry["exception"] = logging.Formatter().formatException(record.exc_info)
    return {name: REDACTOR.redact_value(value, name) for name, value in entry.items()}


def time_of(line: str) -> str:
    """Return the time of a JSON line, or an empty string for any other line; times in UTC sort as text."""
    try:
        return str(json.loads(line)["time"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""


def to_text(entry: Mapping[str, Any]) -> str:
    """Format an entry as text: time, level and message, then the other fields, then the traceback."""
    standard = {"time", "level", "logger", "message", "exception"}
    rest = " ".join(f"{name}={_short(value)}" for name, value in entry.items() if name not in standard)
    line = f"{entry.get('time', '')} {entry.get('level', '')!s:7} {entry.get('message', '')}"
    return "\n".join(filter(None, (f"{line}  {rest}".rstrip(), str(entry.get("exception") or ""))))


def _short(value: Any) -> str:
    return value if isinstance(value, str) and " " not in value else json.dumps(value, ensure_ascii=False)


class JsonFormatter(logging.Formatter):
    """Formats a record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        return json.dumps(record_to_dict(record), ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """Formats a record as text for a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, followed by the traceback if there is one."""
        return to_text(record_to_dict(record))


def configure_logs(handler: logging.Handler, level: str) -> None:
    """Send every log record of this process, of our code and of libraries, and Python's warnings to a handler."""
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)


def handler_for(form: Format, stream: TextIO) -> logging.Handler:
    """Return a handler that writes each record to a stream."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter() if form is Format.JSON else TextFormatter())
    return handler


def format_from_environment() -> Format:
    """Return the format that the environment names; JSON if it is not set or unknown."""
    value = os.environ.get(FORMAT_ENV, "")
    return Format(value) if value in set(Format) else Format.JSON
