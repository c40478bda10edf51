"""Checks that what a chat row says is in what its template renders; runs in the child process of render_process.

Templates ignore what they do not know, so a dropped field is found by changing it: if the text stays the same, the
template drops it. Each is tried once for messages of the same shape, as a template decides by shape.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from qlora_trainer.data.json_values import has_text
from qlora_trainer.data.rows import Chat, Message, RowError

CLOSE: Final = "\ue001"
"""Private-use character that changes a text, to see whether a template renders it."""
_METADATA: Final = frozenset({
    "id", "uuid", "message_id", "turn_id", "turn_identifier", "conversation_id", "parent_id", "tool_call_id", "index",
    "timestamp", "created_at", "updated_at", "date", "time", "language", "lang", "country", "state", "hashed_ip",
    "header", "model", "source", "dataset", "type", "object", "status", "finish_reason", "stop_reason", "cache_control",
})  # fmt: skip
"""Fields of a message that identify or describe it, and are no part of what is said."""
_FIX: Final = "set spec.dataset.chatTemplate, use another model, or leave the field out"


class Marks(NamedTuple):
    """Two characters that mark a text while a template renders it, and do not occur in the conversation."""

    open: str
    close: str


Variant = tuple[str, Any]
"""Name of a part of a field, and the field with only that part changed."""


@dataclass(frozen=True)
class FieldCheck:
    """Finds fields that a template drops; `render` returns the text of a conversation, or raises RowError."""

    render: Callable[[Chat], str]
    marks: Marks
    _reached: set[tuple[Any, ...]] = field(default_factory=set)
    """Shapes of messages whose field is known to be rendered."""

    def check_tools(self, chat: Chat, text: str) -> None:
        """Raise RowError if the template drops a tool."""
        if not chat.tools or ("tools",) in self._reached:
            return
        for part, tools in _tool_variants(chat.tools):
            if not self._changes(Chat(chat.messages, tools), text):
                raise dropped(part)
        self._reached.add(("tools",))

    def dropped_context(self, chat: Chat, text: str, messages: Iterable[int]) -> dict[int, str]:
        """Return the messages that the template drops, none of them an answer, each with its first dropped field."""
        found = (
            (index, self.dropped_field(chat, index, text))
            for index in messages
            if chat.messages[index]["role"] != "assistant"
        )
        return {index: name for index, name in found if name is not None}

    def dropped_field(self, chat: Chat, index: int, text: str) -> str | None:
        """Return the field of a message that is not in the text, or None."""
        message = chat.messages[index]
        if message["content"].strip() and self._drops_content(chat, index, text):
            return "content"
        for name, value in message.items():
            shape = _shape_of(chat, index, name)
            if shape in self._reached or not _is_content(message, name):
                continue
            for part, changed in _variants(name, value):
                if not self._changes(_with(chat, index, name, changed), text):
                    return part
            self._reached.add(shape)
        return None

    def _drops_content(self, chat: Chat, index: int, text: str) -> bool:
        content, shape = chat.messages[index]["content"], _shape_of(chat, index, "content")
        if contains(text, content):
            if shape not in self._reached and not self._changes(_with(chat, index, "content", content + CLOSE), text):
                return True
            self._reached.add(shape)
            return False
        # Rewritten: in other letters, for example. Its first and its last character tell whether all of it is there.
        return not (
            self._shows(_with(chat, index, "content", self.marks.open + content), self.marks.open)
            and self._shows(_with(chat, index, "content", content + self.marks.close), self.marks.close)
        )

    def _changes(self, chat: Chat, text: str) -> bool:
        try:
            return self.render(chat) != text
        except RowError:  # the template reads the field, and accepts no other value
            return True

    def _shows(self, chat: Chat, mark: str) -> bool:
        try:
            return mark in self.render(chat)
        except RowError:
            return True


def dropped(where: str) -> RowError:
    """Return the error for a field that the template drops."""
    return RowError(f"{where} is dropped by the model's chat template; {_FIX}")


def contains(text: str, content: str) -> bool:
    """Return whether a text has a content, but for white space, as it is or as JSON."""
    if content.strip() in text:
        return True
    squeezed = _squeeze(text)
    return _squeeze(content) in squeezed or _squeeze(json.dumps(content, ensure_ascii=False)[1:-1]) in squeezed


def _squeeze(text: str) -> str:
    return "".join(text.split())


def has_other_fields(message: Message) -> bool:
    """Return whether a message says something beside its content, such as thoughts or calls."""
    return any(_is_content(message, name) for name in message)


def _is_content(message: Message, name: str) -> bool:
    if name in {"role", "content"} | _METADATA:
        return False
    # A tool's answer belongs to its call, which has the name.
    return has_text(message[name]) and not (name == "name" and message["role"] == "tool")


def _shape_of(chat: Chat, index: int, name: str) -> tuple[Any, ...]:
    """Return all that a template usually decides by: the message's role and fields, and its place."""
    message, roles = chat.messages[index], [message["role"] for message in chat.messages]
    filled = frozenset(key for key, value in message.items() if value)
    later = roles[index + 1 :]
    return name, message["role"], filled, later[:1] == [], "user" in later, later[:1] == ["tool"], bool(chat.tools)


def _with(chat: Chat, index: int, name: str, value: Any) -> Chat:
    changed = {**chat.messages[index], name: value}
    return Chat((*chat.messages[:index], changed, *chat.messages[index + 1 :]), chat.tools)


def _variants(name: str, value: Any) -> Iterator[Variant]:
    yield name, _changed(value)
    if name != "tool_calls":
        return
    for key in ("name", "arguments"):
        if any(_inner(call).get(key) for call in value):
            yield f"tool_calls ({key})", [_change_key(call, key) for call in value]


def _tool_variants(tools: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, tuple[Mapping[str, Any], ...]]]:
    if has_text(list(tools)):
        yield "field 'tools'", tuple(_changed(tool) for tool in tools)
    for key in ("name", "description"):
        if any(_inner(tool).get(key) for tool in tools):
            yield f"field 'tools' ({key})", tuple(_change_key(tool, key) for tool in tools)
    if any(_has_properties(tool) for tool in tools):
        changed = (_change_key(tool, "parameters") if _has_properties(tool) else tool for tool in tools)
        yield "field 'tools' (parameters)", tuple(changed)


def _has_properties(tool: Mapping[str, Any]) -> bool:
    parameters = _inner(tool).get("parameters")
    return isinstance(parameters, dict) and bool(parameters.get("properties"))


def _inner(call: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the function of a call or a tool; in some datasets there is no object around it."""
    function = call.get("function")
    return function if isinstance(function, dict) else call


def _change_key(call: Mapping[str, Any], key: str) -> dict[str, Any]:
    function = _inner(call)
    changed = {**function, key: _changed(function[key])} if function.get(key) else dict(function)
    return changed if function is call else {**call, "function": changed}


def _changed(value: Any) -> Any:
    """Return a value with all that it contains changed."""
    if isinstance(value, str):
        return value + CLOSE
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, dict):
        return {key: _changed(item) for key, item in value.items()}
    return [_changed(item) for item in value] if isinstance(value, list) else value


def with_text_arguments(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Return the messages with the arguments of calls as JSON in text, for templates that insert them into a text."""
    return tuple(
        {**message, "tool_calls": [_to_text(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    )


def _to_text(call: Mapping[str, Any]) -> dict[str, Any]:
    function = _inner(call)
    if not isinstance(function.get("arguments"), dict):
        return dict(call)
    changed = {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}
    return changed if function is call else {**call, "function": changed}


def call_arguments(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return the arguments of all calls that have any, where they are objects."""
    found = (_inner(call).get("arguments") for message in messages for call in message.get("tool_calls") or ())
    return [arguments for arguments in found if isinstance(arguments, dict) and arguments]
