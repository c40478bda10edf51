"""Renders conversations and finds the assistant's turns in the text; runs in the child process of render_process."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, NamedTuple

from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError, UndefinedError
from transformers.utils import chat_template_utils
from transformers.utils.chat_template_utils import render_jinja_template

from qlora_trainer.data.render_limits import CPU_BUDGET
from qlora_trainer.data.rows import Chat, Message, RowError
from qlora_trainer.data.tokenization import Span

_OPEN, CLOSE = "\ue000", "\ue001"
"""Private-use characters that mark an answer while a template renders it."""
_CAUSES: Final = {
    cause.__name__: cause
    for cause in (SecurityError, UndefinedError, TypeError, ValueError, KeyError, OverflowError, RecursionError)
}
"""Exceptions of templates by name, as the child process reports them; Jinja's sandbox raises some built-in ones."""
_MAX_ERROR_CHARACTERS: Final = 2000
"""Of a template's message: a template may raise an exception with any text."""


class FixedClock:
    """The clock of every template: with today's date, each day's rows and result would be others.

    26 July 2024 is the date that Llama 3's own template uses where there is no clock.
    """

    @staticmethod
    def now() -> datetime:
        """Return the fixed date."""
        return datetime(2024, 7, 26)  # noqa: DTZ001 (templates format a local date)


def set_fixed_clock() -> None:
    """Set the clock of `strftime_now`, for this process."""
    vars(chat_template_utils)["datetime"] = FixedClock


class RenderedChat(NamedTuple):
    """A rendered conversation, and the character spans of the assistant's turns, each up to its stop token."""

    text: str
    assistant_spans: tuple[Span, ...]
    prompt: str
    """Everything before the last answer, with the generation prompt; empty if no prompt was requested."""
    answer: str


class TemplateRejectionError(RowError):
    """The template raised an exception."""

    def __init__(self, error: str, kind: str, line: int | None = None) -> None:
        super().__init__(f"the chat template rejects it: {error}; correct the row or the template")
        self.error = error
        self.kind = kind
        """Name of the exception's type."""
        self.line = line


def cause_of(rejection: TemplateRejectionError) -> Exception:
    """Return the template's exception, rebuilt in the parent process."""
    if rejection.line is not None:
        return TemplateSyntaxError(rejection.error, rejection.line)
    return _CAUSES.get(rejection.kind, TemplateError)(rejection.error)


@dataclass(frozen=True)
class ChatRenderer:
    """A chat template with everything that rendering needs of the tokenizer."""

    source: str
    special_tokens: Mapping[str, Any]
    has_generation_tags: bool
    stop_token: str

    def render(self, chat: Chat, *, with_prompt: bool = True) -> RenderedChat:
        """Render a conversation, or raise RowError; training rows need no prompt."""
        text, tagged = self._apply(chat.messages, chat)
        # Without tags, the end of the prompt is the start of the last answer.
        prompt = self.render_prompt(chat.messages[:-1], chat) if with_prompt or not self.has_generation_tags else ""
        answer = str(chat.messages[-1]["content"])
        turns = tagged if self.has_generation_tags else self._assistant_spans(chat, text, prompt)
        return RenderedChat(text, tuple(self._extend_to_stop_token(text, turn) for turn in turns), prompt, answer)

    def render_prompt(self, messages: Sequence[Message], chat: Chat) -> str:
        """Render messages with the generation prompt and the tools of `chat`, or raise RowError."""
        return self._apply(messages, chat, add_generation_prompt=True)[0]

    def render_messages(self, messages: Sequence[Message], chat: Chat) -> str:
        """Render messages that end with an answer, or raise RowError."""
        return self._apply(messages, chat)[0]

    def _apply(
        self, messages: Sequence[Message], chat: Chat, *, add_generation_prompt: bool = False
    ) -> tuple[str, list[Span]]:
        try:
            with CPU_BUDGET.spending():
                (text,), spans = render_jinja_template(
                    [[dict(message) for message in messages]],
                    tools=[dict(tool) for tool in chat.tools] or None,
                    chat_template=self.source,
                    return_assistant_tokens_mask=self.has_generation_tags,
                    add_generation_prompt=add_generation_prompt,
                    **self.special_tokens,
                )
        except Exception as error:
            if isinstance(error, MemoryError):
                raise
            line = error.lineno if isinstance(error, TemplateSyntaxError) else None
            raise TemplateRejectionError(str(error)[:_MAX_ERROR_CHARACTERS], type(error).__name__, line) from error
        CPU_BUDGET.add_for_text(text)
        return text, list(spans[0]) if self.has_generation_tags else []

    def _assistant_spans(self, chat: Chat, text: str, prompt: str) -> list[Span]:
        *earlier, last = (index for index, message in enumerate(chat.messages) if message["role"] == "assistant")
        turns = [self._assistant_span(chat, index, text) for index in earlier]
        return [
            *turns,
            (len(prompt), len(text)) if text.startswith(prompt) else self._find_by_markers(chat, last, text),
        ]

    def _assistant_span(self, chat: Chat, index: int, text: str) -> Span:
        """Locate an answer by rendering the conversation without it and with it."""
        before, _ = self._apply(chat.messages[:index], chat, add_generation_prompt=True)
        after, _ = self._apply(chat.messages[: index + 1], chat)
        if text.startswith(before) and text.startswith(after):
            return len(before), len(after)
        return self._find_by_markers(chat, index, text)

    def _find_by_markers(self, chat: Chat, index: int, text: str) -> Span:
        """Locate an answer by markers around it, for templates that render earlier turns differently from the last."""
        content = chat.messages[index]["content"]
        for answer in (content, content.strip()):
            marked = {**chat.messages[index], "content": f"{_OPEN}{answer}{CLOSE}"}
            found, _ = self._apply((*chat.messages[:index], marked, *chat.messages[index + 1 :]), chat)
            start, end = found.find(_OPEN), found.find(CLOSE) - len(_OPEN)
            if 0 <= start < end and found.replace(_OPEN, "").replace(CLOSE, "") == text:
                return start, end
        raise RowError(
            f"the chat template rewrites messages[{index}], so its tokens cannot be located; put {{% generation %}} "
            "around the answer in spec.dataset.chatTemplate"
        )

    def _extend_to_stop_token(self, text: str, turn: Span) -> Span:
        """End a turn with its stop token: neither before it, nor with the line break after it."""
        start, end = turn
        if not self.stop_token:
            return turn
        inside = text.rfind(self.stop_token, start, end)
        if inside >= 0 and not text[inside + len(self.stop_token) : end].strip():
            return start, inside + len(self.stop_token)
        after = re.compile(r"\s*" + re.escape(self.stop_token)).match(text, end)
        return (start, after.end()) if after else turn
