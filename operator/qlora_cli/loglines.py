"""Lines of a pod's log for people: the trainer writes JSON (docs/logs.md), its libraries' launchers write text."""

import json
from typing import Final, NamedTuple

from qlora_api.logs import to_text

_KNOWN: Final = frozenset({"namespace", "job", "attempt", "rank", "updatedAt"})
"""Fields that the prefix says already, or the time does."""


class LogLine(NamedTuple):
    """A line, and the process that wrote it, where it says so."""

    rank: int | None
    text: str


def read_line(line: str) -> LogLine:
    """Return a line of JSON as a sentence with its fields, and any other as it is."""
    try:
        told = json.loads(line)
    except ValueError:
        return LogLine(None, line)
    if not isinstance(told, dict) or "message" not in told:
        return LogLine(None, line)
    return LogLine(told.get("rank"), to_text({name: value for name, value in told.items() if name not in _KNOWN}))
