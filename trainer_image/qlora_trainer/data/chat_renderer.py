"""Renders conversations and finds the assistant's turns in the text; runs in the child process of render_process."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Final, NamedTuple

from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError, UndefinedError
from transformers.utils import chat_template_utils
from transformers.utils.chat_template_utils import render_jinja_template

from qlora_trainer.data.render_limits import CPU_BUDGET
from qlora_trainer.data.rendered_fields import (
    CLOSE,
    OPEN,
    FieldCheck,
    call_arguments,
    dropped,
    has_other_fields,
    with_text_arguments,
)
from qlora_trainer.data.rows import Chat, Message, RowError
from qlora_trainer.data.tokenization import Span

GENERATION_TAG: Final = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""The tag with which a template marks the assistant's output itself."""
_MARKED: Final[Message] = {"role": "assistant", "content": CLOSE}
_OBJECT_ARGUMENTS: Final = ("arguments",)
"""Shape that says that the template takes the arguments of calls as objects."""
_OPENING_TAG: Final = re.compile(r"\s*(<[A-Za-z_]+>)")
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
    """Answers that are trained on."""
    masked_spans: tuple[Span, ...]
    """Answers that are not trained on although everything else is."""
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
        check = FieldCheck(lambda changed: self._apply(changed.messages, changed)[0], self.rendered_shapes)
        rendered, part = [], chat
        while True:
            found, learned = self._render_part(part, pending, check, loss, with_prompt=with_prompt)
            rendered.append(found)
            pending = [index for index in pending if index not in learned]
            if not pending:
                return rendered[::-1]
            part = replace(chat, messages=chat.messages[: pending[-1] + 1])

    def render_prompt(self, messages: Sequence[Message], chat: Chat) -> str:
        """Render messages with the generation prompt and the tools of `chat`, or raise RowError."""
        return self._apply(messages, chat, add_generation_prompt=True)[0]

    def render_messages(self, messages: Sequence[Message], chat: Chat) -> str:
        """Render messages that end with an answer, or raise RowError."""
        return self._apply(messages, chat)[0]

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

    def _render_part(
        self, chat: Chat, pending: Sequence[int], check: FieldCheck, loss: str, *, with_prompt: bool
    ) -> tuple[RenderedChat, list[int]]:
        """Render a conversation, and return which of the pending answers are learned from it: its last, at least."""
        text, tags = self._apply(chat.messages, chat)
        check.check_context(chat, text)
        tagged = bool(GENERATION_TAG.search(self._source_for(chat)))
        # Without tags, the end of the prompt is the start of the last answer.
        prompt = self.render_prompt(chat.messages[:-1], chat) if with_prompt or not tagged else ""
        last = len(chat.messages) - 1
        masked = [index for index in chat.masked if index <= last and loss == "all"]
        wanted = [*pending, *masked]
        spans = _tagged_spans(chat, tags) if tagged else self._answer_spans(chat, wanted, text, prompt)
        learned = [index for index in pending if index in spans and not check.dropped_field(chat, index, text)]
        if last in pending and last not in learned:
            text, span = self._compose(chat, check.dropped_field(chat, last, text))
            spans, learned = {last: [span]}, [last]
        elif hidden := [index for index in masked if index not in spans]:
            raise RowError(f"messages[{hidden[0]}] has the weight 0, and the chat template rewrites it; remove the row")
        answer = str(chat.messages[-1]["content"])
        found = RenderedChat(text, self._ends(text, spans, learned), self._ends(text, spans, masked), prompt, answer)
        return found, learned

    def _ends(self, text: str, spans: Mapping[int, list[Span]], answers: Sequence[int]) -> tuple[Span, ...]:
        """Return the spans of some answers in order, each up to its stop token."""
        found = {self._extend_to_stop_token(text, span) for index in answers for span in spans.get(index, ())}
        return tuple(sorted(found))

    def _answer_spans(self, chat: Chat, answers: Sequence[int], text: str, prompt: str) -> dict[int, list[Span]]:
        """Return the spans of the answers that the template renders as they are."""
        last = len(chat.messages) - 1
        spans = {index: self._answer_span(chat, index, text) for index in answers if index < last}
        if last in answers:
            starts = text.startswith(prompt)
            spans[last] = (len(prompt), len(text)) if starts else self._find_start(chat, text)
        return {index: [span] for index, span in spans.items() if span is not None}

    def _answer_span(self, chat: Chat, index: int, text: str) -> Span | None:
        """Locate an answer by rendering the conversation without it and with it."""
        before, _ = self._apply(chat.messages[:index], chat, add_generation_prompt=True)
        after, _ = self._apply(chat.messages[: index + 1], chat)
        if text.startswith(before) and text.startswith(after):
            return len(before), len(after)
        return self._find_by_markers(chat, index, text)

    def _find_start(self, chat: Chat, text: str) -> Span | None:
        """Locate the last answer where it does not follow the prompt, by what precedes the text of any answer."""
        start, mark, _ = self._apply((*chat.messages[:-1], _MARKED), chat)[0].partition(CLOSE)
        if mark and text.startswith(start):
            return len(start), len(text)
        return self._find_by_markers(chat, len(chat.messages) - 1, text)

    def _find_by_markers(self, chat: Chat, index: int, text: str) -> Span | None:
        """Locate an answer by markers around it, for templates that render earlier turns differently from the last.

        Only an answer that is nothing but its content: thoughts and calls are outside the markers.
        """
        if has_other_fields(chat.messages[index]):
            return None
        content = chat.messages[index]["content"]
        for answer in (content, content.strip()):
            marked = {**chat.messages[index], "content": f"{OPEN}{answer}{CLOSE}"}
            found, _ = self._apply((*chat.messages[:index], marked, *chat.messages[index + 1 :]), chat)
            start, end = found.find(OPEN), found.find(CLOSE) - len(OPEN)
            if 0 <= start < end and found.replace(OPEN, "").replace(CLOSE, "") == text:
                return start, end
        return None

    def _compose(self, chat: Chat, dropped_field: str | None) -> tuple[str, Span]:
        """Return the conversation with its last answer as a model writes it, where the template renders it otherwise.

        It follows the generation prompt, as when the model is served. What ends it is what ends any other answer.
        """
        last = len(chat.messages) - 1
        message = chat.messages[last]
        if dropped_field and (dropped_field != "content" or has_other_fields(message)):
            raise dropped(f"messages[{last}].{dropped_field}")
        _, mark, end = self._apply((*chat.messages[:-1], _MARKED), chat)[0].rpartition(CLOSE)
        if not mark or has_other_fields(message):
            raise RowError(
                f"the chat template rewrites messages[{last}], so its tokens cannot be located; put {{% generation %}} "
                "around the answer in spec.dataset.chatTemplate"
            )
        prompt = self.render_prompt(chat.messages[:-1], chat)
        content = _without_repeated_tag(prompt, message["content"])
        return prompt + content + end, (len(prompt), len(prompt) + len(content))

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


def _tagged_spans(chat: Chat, tags: Sequence[Span]) -> dict[int, list[Span]]:
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


def _without_repeated_tag(prompt: str, content: str) -> str:
    """Return an answer without the tag that the generation prompt ends with, such as DeepSeek-R1's <think>."""
    tag = _OPENING_TAG.match(content)
    if tag is None or not prompt.rstrip().endswith(tag[1]):
        return content
    rest = content[tag.end() :]
    return rest.lstrip("\n") if prompt.endswith("\n") else rest


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
