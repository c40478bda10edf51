"""Renders conversations with a chat template; runs in the child process of render_process."""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Final

from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError, UndefinedError
from transformers.utils import chat_template_utils
from transformers.utils.chat_template_utils import render_jinja_template

from qlora_trainer.data.answer_spans import unused_characters
from qlora_trainer.data.chat_parts import ChatParts, RenderedChat
from qlora_trainer.data.render_limits import CPU_BUDGET
from qlora_trainer.data.rendered_fields import FieldCheck, Marks, call_arguments, with_text_arguments
from qlora_trainer.data.rows import Chat, Message, RowError
from qlora_trainer.data.tokenization import Span

GENERATION_TAG: Final = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""The tag with which a template marks the assistant's output itself."""
_OBJECT_ARGUMENTS: Final = ("arguments",)
"""Shape that says that the template takes the arguments of calls as objects."""
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
    stop_token: str
    tools_source: str = ""
    """The template for conversations with tools, where the model has one of its own for them."""
    rendered_shapes: set[tuple[Any, ...]] = field(default_factory=set, compare=False)
    """Shapes of messages whose fields this template is known to render."""

    def render(self, chat: Chat, *, loss: str = "auto", with_prompt: bool = True) -> list[RenderedChat]:
        """Render a conversation, or raise RowError; training rows need no prompt.

        A template may render an answer otherwise as soon as the conversation goes on: without its thoughts, for
        example. Such an answer is learned in a conversation of its own that ends with it, which is what a server
        renders at that point. These come first, and the whole conversation last.
        """
        chat = self._with_arguments(chat)
        answers = [index for index, message in enumerate(chat.messages) if message["role"] == "assistant"]
        pending = [index for index in (answers[-1:] if loss == "completion" else answers) if index not in chat.masked]
        if loss == "completion" and not pending:
            raise RowError(
                f"messages[{answers[-1]}] has the weight 0, and spec.training.loss completion learns only it"
            )
        source = self._source_for(chat)
        characters = tuple(itertools.islice(unused_characters(chat, source), 2 * len(chat.messages)))
        if len(characters) < 2 * len(chat.messages):
            raise RowError(
                "it has nearly all private-use characters of Unicode, and some mark its answers; remove them"
            )
        check = FieldCheck(
            lambda changed: self.render_messages(changed.messages, changed), Marks(*characters[:2]),
            self.rendered_shapes,
        )  # fmt: skip
        parts = ChatParts(self, chat, check, characters, with_prompt).render(
            pending, chat.masked if loss == "all" else ()
        )
        if any("\ud800" <= character <= "\udfff" for part in parts for character in {*part.text, *part.prompt}):
            raise RowError("the chat template renders half a character, a lone surrogate; correct the template")
        return parts

    def render_prompt(self, messages: Sequence[Message], chat: Chat) -> str:
        """Render messages with the generation prompt and the tools of `chat`, or raise RowError."""
        return self._apply(messages, chat, add_generation_prompt=True)[0]

    def render_messages(self, messages: Sequence[Message], chat: Chat) -> str:
        """Render messages that end with an answer, or raise RowError."""
        return self._apply(messages, chat)[0]

    def render_tagged(self, chat: Chat) -> tuple[str, list[Span] | None]:
        """Render a conversation, with the spans that the template marks, or None if it marks none by itself."""
        text, spans = self._apply(chat.messages, chat)
        return text, spans if GENERATION_TAG.search(self._source_for(chat)) else None

    def _source_for(self, chat: Chat) -> str:
        return self.tools_source if chat.tools and self.tools_source else self.source

    def _apply(
        self, messages: Sequence[Message], chat: Chat, *, add_generation_prompt: bool = False
    ) -> tuple[str, list[Span]]:
        source = self._source_for(chat)
        tagged = bool(GENERATION_TAG.search(source))
        try:
            with CPU_BUDGET.spending():
                (text,), spans = render_jinja_template(
                    [[dict(message) for message in messages]],
                    tools=[dict(tool) for tool in chat.tools] or None,
                    chat_template=source,
                    return_assistant_tokens_mask=tagged,
                    add_generation_prompt=add_generation_prompt,
                    **self.special_tokens,
                )
        except Exception as error:
            if isinstance(error, MemoryError):
                raise
            line = error.lineno if isinstance(error, TemplateSyntaxError) else None
            raise TemplateRejectionError(str(error)[:_MAX_ERROR_CHARACTERS], type(error).__name__, line) from error
        CPU_BUDGET.add_for_text(text)
        return text, list(spans[0]) if tagged else []

    def _with_arguments(self, chat: Chat) -> Chat:
        """Return the conversation with arguments as the template takes them: as objects, or as JSON in text."""
        arguments = call_arguments(chat.messages)
        if not arguments or _OBJECT_ARGUMENTS in self.rendered_shapes:
            return chat
        as_text = replace(chat, messages=with_text_arguments(chat.messages))
        try:
            text = self.render_messages(chat.messages, chat)
        except TemplateRejectionError:
            try:
                self.render_messages(as_text.messages, as_text)
            except TemplateRejectionError:
                return chat
            return as_text
        # Written as Python writes them, which is no JSON: such a template expects text.
        if any(str(found) in text and not _is_json(str(found)) for found in arguments):
            return as_text
        self.rendered_shapes.add(_OBJECT_ARGUMENTS)
        return chat


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
