"""Finds the answers in the text of a rendered conversation; runs in the child process of render_process."""

import contextlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

from qlora_trainer.data.rendered_fields import FieldCheck, Marks, has_other_fields
from qlora_trainer.data.rows import Chat, Message, RowError
from qlora_trainer.data.tokenization import Span

_PRIVATE_USE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
"""Characters that Unicode gives no meaning."""


def unused_characters(chat: Chat, source: str) -> Iterator[str]:
    """Yield private-use characters that neither the conversation nor the template contains."""
    used = {*json.dumps([chat.messages, chat.tools], ensure_ascii=False, default=str), *source}
    return (chr(code) for code in itertools.chain(*_PRIVATE_USE) if chr(code) not in used)


class Template(Protocol):
    """A chat template."""

    @property
    def stop_token(self) -> str:
        """Text of the special token after an answer; empty if the template has none."""

    def render_messages(self, messages: Sequence[Message], chat: Chat) -> str:
        """Render messages with the tools of `chat`, or raise RowError."""

    def render_prompt(self, messages: Sequence[Message], chat: Chat) -> str:
        """Render messages with the generation prompt and the tools of `chat`, or raise RowError."""

    def render_tagged(self, chat: Chat) -> tuple[str, list[Span] | None]:
        """Render a conversation, with the spans that the template marks, or None if it marks none by itself."""


def head_of_answer(template: Template, messages: Sequence[Message], chat: Chat, marks: Marks) -> tuple[str, str, str]:
    """Return what precedes the content of an answer to these messages, a mark, and what follows the content."""
    answer = {"role": "assistant", "content": marks.close}
    return template.render_messages((*messages, answer), chat).rpartition(marks.close)


@dataclass(frozen=True)
class AnswerFinder:
    """Finds earlier answers in the text of a conversation, each with a few renderings."""

    template: Template
    chat: Chat
    text: str
    check: FieldCheck
    """Renders changed conversations as `text` is rendered."""
    characters: Sequence[str]
    """Two for each message, none of them in the conversation."""

    def find(self, index: int) -> Span | None:
        """Locate an answer by rendering the conversation without it and with it, or by marks."""
        messages = self.chat.messages
        before = self.template.render_prompt(messages[:index], self.chat)
        after = self.template.render_messages(messages[: index + 1], self.chat)
        follows, ends = self.text.startswith(before), self.text.startswith(after)
        if follows and ends:
            return len(before), len(after)
        if (span := self.find_by_marks(index)) is not None:
            return span
        try:
            start = len(before) if follows else self._start(index)
            if start is None:
                return None
            end = len(after) if ends else self._end_before_next(index, start)
        except RowError:  # the template takes no such conversation
            return None
        return None if end is None or end <= start else (start, end)

    def find_by_marks(self, index: int) -> Span | None:
        """Locate an answer by marks around it, for templates that render earlier turns differently from the last.

        Only an answer that is nothing but its content: thoughts and calls are outside the marks.
        """
        if has_other_fields(self.chat.messages[index]):
            return None
        if index in self._marked_spans:
            return self._marked_spans[index]
        # Where all are marked at once, the marks of another one may have changed the text.
        return None if self._marked_spans else self._spans_by_marks([index]).get(index)

    def _start(self, index: int) -> int | None:
        head, mark, _ = head_of_answer(self.template, self.chat.messages[:index], self.chat, self.check.marks)
        return len(head) if mark and self.text.startswith(head) else None

    def _end_before_next(self, index: int, start: int) -> int | None:
        """Locate the stop token of an answer that is rendered otherwise where the conversation ends with it."""
        mark, following = self.check.marks.open, self.chat.messages[index + 1]
        marked = {**following, "content": mark + following["content"]}
        text = self.template.render_messages((*self.chat.messages[: index + 1], marked), self.chat)
        head, found, _ = text.partition(mark)
        stop = self.template.stop_token
        # A second stop token would be in the answer, or of another turn.
        if not found or not stop or not self.text.startswith(head) or head.count(stop, start) != 1:
            return None
        return head.index(stop, start) + len(stop)

    @cached_property
    def _marked_spans(self) -> dict[int, Span]:
        """Spans of all answers that are nothing but their content, by marks around all of them at once."""
        return self._spans_by_marks([
            index
            for index, message in enumerate(self.chat.messages)
            if message["role"] == "assistant" and not has_other_fields(message)
        ])  # fmt: skip

    def _spans_by_marks(self, answers: Sequence[int]) -> dict[int, Span]:
        marks = {index: Marks(*self.characters[2 * index : 2 * index + 2]) for index in answers}
        for strip in (False, True):
            changed = [
                _surround(message, *marks[index], strip=strip) if index in marks else message
                for index, message in enumerate(self.chat.messages)
            ]
            with contextlib.suppress(RowError):  # the template rejects the marks
                found = self.check.render(replace(self.chat, messages=tuple(changed)))
                if spans := _spans_between(found, marks, self.text):
                    return spans
        return {}


def _surround(message: Message, opening: str, closing: str, *, strip: bool) -> Message:
    content = message["content"].strip() if strip else message["content"]
    return {**message, "content": f"{opening}{content}{closing}"}


def _spans_between(found: str, marks: Mapping[int, Marks], text: str) -> dict[int, Span]:
    """Return the spans between marks; none if the text without the marks is another."""
    if not marks:
        return {}
    pattern = re.compile("[" + "".join(itertools.chain(*marks.values())) + "]")
    if pattern.sub("", found) != text:
        return {}
    places: dict[str, int] = {}
    for count, match in enumerate(pattern.finditer(found)):
        places.setdefault(match[0], match.start() - count)
    spans = {index: (places.get(opening, -1), places.get(closing, -1)) for index, (opening, closing) in marks.items()}
    return {index: span for index, span in spans.items() if 0 <= span[0] < span[1]}


def tagged_spans(chat: Chat, tags: Sequence[Span]) -> dict[int, list[Span]]:
    """Return the spans that the template marks, by answer."""
    answers = [index for index, message in enumerate(chat.messages) if message["role"] == "assistant"]
    if not tags:
        raise RowError("the chat template marks no answer; put {% generation %} around what the assistant says")
    if len(tags) == len(answers):
        return {index: [tag] for index, tag in zip(answers, tags, strict=True)}
    if chat.masked:
        raise RowError(
            f"messages[{chat.masked[0]}] has the weight 0, and the chat template marks {len(tags)} texts of "
            f"{len(answers)} answers; remove the weight, or put one {{% generation %}} around each answer"
        )
    return {index: list(tags) for index in answers}


def extend_to_stop_token(text: str, turn: Span, stop_token: str) -> Span:
    """End a turn with its stop token: neither before it, nor with the line break after it."""
    start, end = turn
    if not stop_token:
        return turn
    inside = text.rfind(stop_token, start, end)
    if inside >= 0 and not text[inside + len(stop_token) : end].strip():
        return start, inside + len(stop_token)
    after = re.compile(r"\s*" + re.escape(stop_token)).match(text, end)
    return (start, after.end()) if after else turn
