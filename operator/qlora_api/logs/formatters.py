"""The log format of operator and trainer: one JSON object per line, or text for a terminal (docs/logs.md)."""

import contextlib
import json
import logging
import os
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Final, TextIO

from qlora_api.escapes import escape_json, escape_line, escape_text
from qlora_api.logs.redaction import REDACTOR
from qlora_api.units import MIB

_MAX_LINE: Final = MIB
"""Characters of a line that is parsed; a foreign one of empty lists takes 24 times its length."""
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


def parse_entry(line: str) -> Mapping[str, Any] | None:
    """Return the fields of a JSON line; None for any other line, and for one that is longer than any of ours."""
    if len(line) > _MAX_LINE:
        return None
    with contextlib.suppress(ValueError, RecursionError):
        entry = json.loads(line)
        return entry if isinstance(entry, dict) else None
    return None


def time_of(line: str) -> str:
    """Return the time of a JSON line, or an empty string for any other line; times in UTC sort as text."""
    return str((parse_entry(line) or {}).get("time", ""))


def to_text(entry: Mapping[str, Any]) -> str:
    """Format an entry as one line of text: time, level, message, other fields; a traceback follows, indented."""
    standard = {"time", "level", "logger", "message", "exception"}
    rest = " ".join(f"{name}={_short(value)}" for name, value in entry.items() if name not in standard)
    line = f"{entry.get('time', '')} {entry.get('level', '')!s:7} {entry.get('message', '')}  {rest}".rstrip()
    traceback = escape_text(str(entry.get("exception") or ""))
    return "\n".join((escape_line(line), *(f"  {part}" for part in traceback.splitlines())))


def _short(value: Any) -> str:
    return value if isinstance(value, str) and " " not in value else json.dumps(value, ensure_ascii=False)


def to_json_line(entry: Mapping[str, Any]) -> str:
    """Format an entry as one line of JSON, which a terminal can show."""
    return escape_json(json.dumps(entry, ensure_ascii=False))


class JsonFormatter(logging.Formatter):
    """Formats a record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        return to_json_line(record_to_dict(record))


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
