"""Conversations of a dataset, in either of the two forms that are in use, checked turn by turn."""

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from qlora_trainer.data.rows import Chat, Message, RowError, kind_of, text_of

_ROLES: Final = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "model": "assistant", "tool": "tool", "observation": "tool", "function": "tool",
}  # fmt: skip
"""What datasets call the speakers, and what chat templates do."""


class _Form(NamedTuple):
    role: str
    content: str


_OPENAI: Final = _Form("role", "content")
_SHAREGPT: Final = _Form("from", "value")


def parse_chat(fields: Mapping[str, Any]) -> Chat:
    """Turn a row into a conversation, or raise RowError with the message at fault."""
    name = "messages" if "messages" in fields else "conversations"
    turns = fields.get(name)
    if turns is None:
        raise RowError("field 'messages' (or 'conversations') is missing; add it")
    if not isinstance(turns, list):
        raise RowError(f"field '{name}' is {kind_of(turns)}, not a list of messages; write [{{…}}, {{…}}]")
    if not turns:
        raise RowError(f"field '{name}' is empty; add a question and an answer, or remove the row")
    messages = tuple(_parse_message(turn, f"{name}[{place}]") for place, turn in enumerate(turns))
    _check_order(messages, name)
    return Chat(messages, _parse_tools(fields.get("tools")))


def _parse_message(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise RowError(f"{where} is {kind_of(turn)}, not a message; write {{'role': …, 'content': …}}")
    # A columnar file gives every message the keys of all, most of them null.
    form = _SHAREGPT if turn.get("role") is None and turn.get("from") is not None else _OPENAI
    word = text_of(turn, form.role, within=where)
    role = _ROLES.get(word)
    if role is None:
        raise RowError(f"{where}.{form.role} is '{word}'; write {', '.join(_ROLES)}")
    calls = turn.get("tool_calls")
    content = text_of(turn, form.content, within=where, blank=bool(calls))
    others = {key: value for key, value in turn.items() if key not in {*_SHAREGPT, *_OPENAI} and value is not None}
    return {"role": role, "content": content, **others}


def _check_order(messages: tuple[Message, ...], name: str) -> None:
    """A conversation is asked and answered: nothing else can be learned from as it will be used."""
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        place = roles.index("system", 1)
        raise RowError(f"{name}[{place}] is from the system; only the first message may be")
    first = roles[1:2] if roles[0] == "system" else roles[:1]
    if first != ["user"]:
        place = 1 if roles[0] == "system" else 0
        who = f"from the {first[0]}" if first else "missing"
        raise RowError(f"{name}[{place}] is {who}; a conversation starts with the user (after a system message)")
    if roles[-1] != "assistant":
        raise RowError(f"{name}[{len(roles) - 1}], the last, is from the {roles[-1]}; end with the assistant's answer")


def _parse_tools(tools: Any) -> tuple[Mapping[str, Any], ...]:
    if tools is None:
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError("field 'tools' is not a list of objects; write JSON schemas, or remove it")
    return tuple(tools)
