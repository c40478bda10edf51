"""Reads the termination message of a container, also one that the kubelet has cut."""

import json
import re
from contextlib import suppress
from typing import Any, Final

from pydantic import ValidationError

from qlora_api.reasons import Reason
from qlora_api.report import TerminationMessage
from qlora_api.tolerant_reader import ignore_unknown

MAX_REASON: Final = 64
"""Characters of an unknown reason that a status message quotes."""
POD_MESSAGE_BYTES: Final = 12 * 1024
"""What the kubelet keeps of the termination messages of a pod: divided by the number of its containers, init and
ephemeral ones included, it is the limit of each (pkg/kubelet/status, normalizeStatus)."""
_DECODER: Final = json.JSONDecoder()
_LONGEST_ESCAPE: Final = len(r"\ud83d\ude00")
"""Characters of JSON that one character takes at most."""


def parse_termination_message(text: str) -> TerminationMessage | None:
    """Parse a termination message; if Kubernetes fell back to the log, it is the last line of that."""
    for candidate in (text.strip(), text.strip().rpartition("\n")[2]):
        if (message := _parse(candidate)) is not None:
            return message
    return _parse_cut(text.strip().rpartition("\n")[2])


def is_cut(text: str) -> bool:
    """Return whether a termination message ends before its JSON does."""
    line = text.strip().rpartition("\n")[2]
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return _parse_cut(line) is not None
    return False


def _parse(text: str) -> TerminationMessage | None:
    try:
        return ignore_unknown(TerminationMessage, text, "a termination message")
    except ValidationError as error:
        return _with_unknown_reason(text, error)


def _with_unknown_reason(text: str, error: ValidationError) -> TerminationMessage | None:
    """Parse a message of a newer trainer that is invalid by its reason only: its facts say what has happened."""
    invalid = [entry for entry in error.errors() if entry["type"] != "extra_forbidden"]
    if [(entry["loc"], entry["type"]) for entry in invalid] != [(("reason",), "enum")]:
        return None
    document = json.loads(text)
    try:
        message = ignore_unknown(TerminationMessage, {**document, "reason": Reason.TRAINER_ERROR}, "a message")
    except ValidationError:  # of the numbers, which are checked last
        return None
    if message.prepared is not None:
        reason = Reason.ALREADY_PUBLISHED if message.prepared.published else Reason.PREPARED
        return message.model_copy(update={"reason": reason})
    if message.result is not None:
        return message.model_copy(update={"reason": Reason.PUBLISHED})
    unknown = f"the trainer is of another version and ended with {str(document['reason'])[:MAX_REASON]!r}"
    return message.model_copy(update={"message": f"{unknown}: {message.message}"})


def _parse_cut(text: str) -> TerminationMessage | None:
    """Parse what is complete of a message that was cut; it begins with the reason."""
    members = _read_members(text)
    with suppress(RecursionError):
        return _parse(json.dumps(members)) if "reason" in members else None
    return None


def _read_members(text: str) -> dict[str, Any]:
    """Return the complete members of a JSON object that ends too early, and what there is of its text."""
    members: dict[str, Any] = {}
    position = 1 if text.startswith("{") else len(text)
    with suppress(ValueError, RecursionError):
        while position < len(text):
            name, position = _DECODER.raw_decode(text, position)
            start = _skip(text, position, ":")
            if name == "message" and text[start : start + 1] == '"':
                members[name], position = _read_text(text, start)
            else:
                members[str(name)], position = _DECODER.raw_decode(text, start)
            position = _skip(text, position, ",")
    return members


def _skip(text: str, position: int, sign: str) -> int:
    """Return where the next token after a sign starts.

    Raises:
        ValueError: There is another sign, or none.

    """
    match = re.compile(rf"\s*{sign}\s*").match(text, position)
    if match is None:
        raise ValueError(f"no {sign} at {position}")
    return match.end()


def _read_text(text: str, start: int) -> tuple[str, int]:
    """Return a string and its end; of one without an end what is complete of it, which may end within an escape."""
    with suppress(ValueError):
        value, end = _DECODER.raw_decode(text, start)
        return str(value), end
    for end in range(len(text), max(len(text) - _LONGEST_ESCAPE, start), -1):
        with suppress(ValueError):
            # The first half of a character that takes two escapes is no character.
            return json.loads(f'{text[start:end]}"').encode(errors="ignore").decode(), len(text)
    raise ValueError("no text")
