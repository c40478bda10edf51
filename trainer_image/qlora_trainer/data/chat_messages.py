"""Parser for chat rows in OpenAI or ShareGPT format; checks every message."""

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from qlora_trainer.data.rows import Chat, Message, RowError, kind_of, text_of

_ROLES: Final = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "model": "assistant", "tool": "tool", "observation": "tool", "function": "tool",
}  # fmt: skip
"""Role names in datasets, and the ones that chat templates use."""


class _MessageKeys(NamedTuple):
    role: str
    content: str


_OPENAI: Final = _MessageKeys("role", "content")
_SHAREGPT: Final = _MessageKeys("from", "value")


def parse_chat(fields: Mapping[str, Any]) -> Chat:
    """Parse a row as a conversation, or raise RowError that names the invalid message."""
    name = "messages" if "messages" in fields else "conversations"
    turns = fields.get(name)
    if turns is None:
        raise RowError("field 'messages' (or 'conversations') is missing; add it")
    if not isinstance(turns, list):
        raise RowError(f"field '{name}' is {kind_of(turns)}, not a list of messages; write [{{…}}, {{…}}]")
    if not turns:
        raise RowError(f"field '{name}' is empty; add a question and an answer, or remove the row")
    messages = tuple(_parse_message(turn, f"{name}[{index}]") for index, turn in enumerate(turns))
    _check_order(messages, name)
    return Chat(messages, _parse_tools(fields.get("tools")))


def _parse_message(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise RowError(f"{where} is {kind_of(turn)}, not a message; write {{'role': …, 'content': …}}")
    # Messages from a columnar file have every key of the column, most of them null.
    keys = _SHAREGPT if turn.get("role") is None and turn.get("from") is not None else _OPENAI
    role_name = text_of(turn, keys.role, within=where)
    role = _ROLES.get(role_name)
    if role is None:
        raise RowError(f"{where}.{keys.role} is '{role_name}'; write {', '.join(_ROLES)}")
    calls = turn.get("tool_calls")
    content = text_of(turn, keys.content, within=where, blank=bool(calls))
    others = {key: value for key, value in turn.items() if key not in {*_SHAREGPT, *_OPENAI} and value is not None}
    return {"role": role, "content": content, **others}


def _check_order(messages: tuple[Message, ...], name: str) -> None:
    """Require user first and assistant last, with the system message at the start only: the order used in inference."""
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        index = roles.index("system", 1)
        raise RowError(f"{name}[{index}] is from the system; only the first message may be")
    first = roles[1:2] if roles[0] == "system" else roles[:1]
    if first != ["user"]:
        index = 1 if roles[0] == "system" else 0
        who = f"from the {first[0]}" if first else "missing"
        raise RowError(f"{name}[{index}] is {who}; a conversation starts with the user (after a system message)")
    if roles[-1] != "assistant":
        raise RowError(f"{name}[{len(roles) - 1}], the last, is from the {roles[-1]}; end with the assistant's answer")


def _parse_tools(tools: Any) -> tuple[Mapping[str, Any], ...]:
    if tools is None:
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError("field 'tools' is not a list of objects; write JSON schemas, or remove it")
    return tuple(tools)
