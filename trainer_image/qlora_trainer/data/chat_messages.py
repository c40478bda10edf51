"""Parser for chat rows: OpenAI's, ShareGPT's, or a prompt and a completion as messages; checks every message."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from qlora_trainer.data.json_values import check_unicode, has_text, parse_json_text, without_nulls
from qlora_trainer.data.rows import Chat, Message, RowError, kind_of, text_of
from qlora_trainer.data.tool_calls import parse_calls, parse_function_call, parse_tools

_CALL: Final = "call"
_ROLES: Final = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "model": "assistant", "tool": "tool", "observation": "tool", "function": "tool",
    "tool_response": "tool", "function_call": _CALL, "tool_call": _CALL,
}  # fmt: skip
"""Role names in datasets, and the ones that chat templates use; a call in a message of its own is the assistant's."""
_MAY_BE_EMPTY: Final = ("system", "tool")
"""Roles whose content may be empty: no instructions, and the result of a command that prints nothing."""
_TURN_FLAGS: Final = ("train", "training", "train_on_turn")
_LABEL_FLAGS: Final = ("weight", "loss", *_TURN_FLAGS)
"""Fields of a message that say whether its answer is trained on: of OpenAI, ms-swift and axolotl."""
_SYSTEM_FIELDS: Final = ("system", "system_prompt")
"""Fields of a row with the system message, as in ShareGPT datasets."""
_MAX_MESSAGES: Final = 2000
"""Of a conversation: each answer is located by rendering all, so that the time is quadratic; 10 s for so many."""
_MESSAGES_AS_TEXT: Final = re.compile(r'\s*\[\s*\{\s*"(role|content|from|value)"\s*:')
_TEXT_PARTS: Final = ("text", "input_text", "output_text")


class _MessageKeys(NamedTuple):
    role: str
    content: str


_OPENAI: Final = _MessageKeys("role", "content")
_SHAREGPT: Final = _MessageKeys("from", "value")


class _Turn(NamedTuple):
    """A message, and whether it is trained on; None if the row does not say."""

    message: Message
    trained: bool | None


def parse_chat(fields: Mapping[str, Any]) -> Chat:
    """Parse a row as a conversation, or raise RowError that names the invalid message."""
    name, found, untrained = _messages(fields)
    turns = [_parse_message(turn, f"{name}[{index}]") for index, turn in enumerate(found)]
    messages = tuple(turn.message for turn in turns)
    _check_order(messages, name)
    masked = tuple(
        index
        for index, (message, trained) in enumerate(turns)
        if message["role"] == "assistant" and (index < untrained or trained is False)
    )
    if len(masked) == sum(message["role"] == "assistant" for message in messages):
        raise RowError(f"every answer in '{name}' has the weight 0, so nothing is learned; remove the row")
    return _with_system(_without_empty_system(Chat(messages, parse_tools(fields), masked)), fields, name)


def _messages(fields: Mapping[str, Any]) -> tuple[str, Sequence[Any], int]:
    """Return name and messages of the conversation, and how many of them are prompt, whose answers are not learned."""
    name = next((name for name in ("messages", "conversations") if fields.get(name) is not None), None)
    if name is not None:
        return name, _as_list(fields[name], name), 0
    if not is_messages(fields.get("prompt")):
        raise RowError("field 'messages' (or 'conversations') is missing; add it")
    prompt = _as_list(fields["prompt"], "prompt")
    completion = fields.get("completion")
    if completion is None:
        raise RowError("field 'completion' is missing; add it")
    if isinstance(completion, str) and not completion.lstrip().startswith("["):
        completion = [{"role": "assistant", "content": completion}]
    return "prompt+completion", [*prompt, *_as_list(completion, "completion")], len(prompt)


def is_messages(prompt: Any) -> bool:
    """Return whether the prompt of a row is messages, also as JSON in text, and not a text."""
    return isinstance(prompt, list) or (isinstance(prompt, str) and bool(_MESSAGES_AS_TEXT.match(prompt)))


def _as_list(turns: Any, name: str) -> list[Any]:
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        turns = parse_json_text(turns, f"field '{name}'")
    if not isinstance(turns, list):
        raise RowError(f"field '{name}' is {kind_of(turns)}, not a list of messages; write [{{…}}, {{…}}]")
    if len(turns) > _MAX_MESSAGES:
        raise RowError(f"field '{name}' has {len(turns):,} messages, more than {_MAX_MESSAGES:,}; split the row")
    if not turns:
        raise RowError(f"field '{name}' is empty; add a question and an answer, or remove the row")
    return turns


def _parse_message(turn: Any, where: str) -> _Turn:
    if not isinstance(turn, dict):
        raise RowError(f"{where} is {kind_of(turn)}, not a message; write {{'role': …, 'content': …}}")
    # Messages from a columnar file have every key of the column, most of them null.
    keys = _SHAREGPT if turn.get("role") is None and turn.get("from") is not None else _OPENAI
    role_name = text_of(turn, keys.role, within=where)
    role = _ROLES.get(role_name)
    if role is None:
        raise RowError(f"{where}.{keys.role} is '{role_name}'; write {', '.join(_ROLES)}")
    if role == _CALL:
        found = parse_calls(text_of(turn, keys.content, within=where), f"{where}.{keys.content}")
        # ShareGPT has the function alone, and templates expect OpenAI's form.
        calls = [call if "function" in call else {"type": "function", "function": call} for call in found]
        return _Turn({"role": "assistant", "content": "", "tool_calls": calls}, _label_flag(turn, where, "assistant"))
    calls = [*parse_calls(turn.get("tool_calls"), f"{where}.tool_calls"), *parse_function_call(turn, where)]
    content = _content(turn, keys, where, calls=bool(calls), blank=bool(calls) or role in _MAY_BE_EMPTY)
    return _Turn(
        {"role": role, "content": content, **({"tool_calls": calls} if calls else {}), **_others(turn, keys, where)},
        _label_flag(turn, where, role),
    )


def _content(turn: Mapping[str, Any], keys: _MessageKeys, where: str, *, calls: bool, blank: bool) -> str:
    # A call has no text of its own, in some datasets not even the key.
    fields = {keys.content: ""} if calls else {}
    if keys.content in turn:
        fields = {keys.content: _joined(turn[keys.content], f"{where}.{keys.content}")}
    return text_of(fields, keys.content, within=where, blank=blank)


def _joined(content: Any, where: str) -> Any:
    """Join the text parts of a content, as vLLM does for the templates of text models."""
    if not isinstance(content, list):
        return content
    return "\n".join(_part_text(part, f"{where}[{index}]") for index, part in enumerate(content))


def _part_text(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise RowError(f"{where} is {kind_of(part)}, not a part of a content; write {{'type': 'text', 'text': …}}")
    kind = part.get("type") or ("text" if part.get("text") is not None else None)
    if kind not in _TEXT_PARTS:
        raise RowError(f"{where} has the type '{kind}', and only text is trained on; write text, or remove the row")
    return text_of(part, "text", within=where, blank=True)


def _others(turn: Mapping[str, Any], keys: _MessageKeys, where: str) -> dict[str, Any]:
    """Return the other fields that have content, for the chat template."""
    read = {*keys, "tool_calls", "function_call", *_LABEL_FLAGS}
    others = {key: without_nulls(value) for key, value in turn.items() if key not in read and not _is_blank(value)}
    check_unicode(others, where)
    return others


def _is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _label_flag(turn: Mapping[str, Any], where: str, role: str) -> bool | None:
    """Return whether the message is trained on, or None if it does not say."""
    given = [flag for flag in _LABEL_FLAGS if turn.get(flag) is not None]
    for flag in given:
        if not isinstance(turn[flag], (bool, int, float)) or turn[flag] not in {0, 1}:
            raise RowError(f"{where}.{flag} is {turn[flag]!r}; write 0 (not learned) or 1")
    if role != "assistant" and (asked := [flag for flag in _TURN_FLAGS if turn.get(flag)]):
        raise RowError(f"{where}.{asked[0]} is true, and only answers of the assistant are learned; remove it")
    return all(turn[flag] for flag in given) if given else None


def _without_empty_system(chat: Chat) -> Chat:
    """Return the conversation without a system message that says nothing, as datasets with a fixed form have it."""
    first = chat.messages[0]
    if first["role"] != "system" or first["content"].strip() or set(first) != {"role", "content"}:
        return chat
    return Chat(chat.messages[1:], chat.tools, tuple(index - 1 for index in chat.masked))


def _with_system(chat: Chat, fields: Mapping[str, Any], name: str) -> Chat:
    """Return the conversation with the system message that the row has in a field of its own."""
    given = next((field for field in _SYSTEM_FIELDS if has_text(fields.get(field))), None)
    if given is None:
        return chat
    content = text_of(fields, given)
    first = chat.messages[0]
    if first["role"] != "system":
        masked = tuple(index + 1 for index in chat.masked)
        return Chat(({"role": "system", "content": content}, *chat.messages), chat.tools, masked)
    if first["content"].strip() != content.strip():
        raise RowError(f"has a system message in field '{given}' and another in {name}[0]; keep one")
    return chat


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
