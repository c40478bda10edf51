"""Renders conversations with a chat template, tokenizes them and finds the assistant's tokens for the label mask."""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

from jinja2.exceptions import TemplateError, TemplateSyntaxError
from transformers.utils.chat_template_utils import render_jinja_template

from qlora_api.reasons import Reason
from qlora_trainer.data.rows import Chat, Message, RowError
from qlora_trainer.data.tokenization import Span, TokenRow, tokenize
from qlora_trainer.errors import RunError

_OPEN, _CLOSE = "\ue000", "\ue001"
"""Private-use characters that mark an answer while a template renders it."""
_GENERATION_TAG: Final = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""The tag with which a template marks the assistant's output itself."""
_TEMPLATE_ERRORS: Final = (
    TemplateError, TypeError, ValueError, KeyError, AttributeError, ArithmeticError, RecursionError,
)  # fmt: skip
"""What a template can raise; Jinja's sandbox raises OverflowError for a range that is too large."""
_EMPTY_CHAT: Final = Chat(())
_QUESTION: Final[Message] = {"role": "user", "content": "Hello"}


class RenderedChat(NamedTuple):
    """A rendered conversation, and the character spans of the assistant's turns, each up to its stop token."""

    text: str
    assistant_spans: tuple[Span, ...]
    prompt: str
    """Everything before the last answer, with the generation prompt; empty if no prompt was requested."""
    answer: str


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template and its end-of-turn token."""

    tokenizer: Any
    source: str
    has_generation_tags: bool
    """Whether the template marks the assistant's output with `{% generation %}`."""
    stop_token: str = ""
    """Text of the special token after an answer; empty if the template has none."""

    def render(self, chat: Chat, *, with_prompt: bool = True) -> RenderedChat:
        """Render a conversation, or raise RowError; training rows need no prompt."""
        text, tagged = self._apply(chat.messages, chat)
        # Without tags, the end of the prompt is the start of the last answer.
        prompt = self.render_prompt(chat.messages[:-1], chat) if with_prompt or not self.has_generation_tags else ""
        answer = str(chat.messages[-1]["content"])
        turns = tagged if self.has_generation_tags else self._assistant_spans(chat, text, prompt)
        return RenderedChat(text, tuple(self._extend_to_stop_token(text, turn) for turn in turns), prompt, answer)

    def render_prompt(self, messages: Sequence[Message], chat: Chat = _EMPTY_CHAT) -> str:
        """Render messages with the generation prompt and the tools of `chat`, or raise RowError."""
        return self._apply(messages, chat, add_generation_prompt=True)[0]

    def _apply(
        self, messages: Sequence[Message], chat: Chat, *, add_generation_prompt: bool = False
    ) -> tuple[str, list[Span]]:
        try:
            (text,), spans = render_jinja_template(
                [[dict(message) for message in messages]],
                tools=[dict(tool) for tool in chat.tools] or None,
                chat_template=self.source,
                return_assistant_tokens_mask=self.has_generation_tags,
                add_generation_prompt=add_generation_prompt,
                **self.tokenizer.special_tokens_map,
            )
        except _TEMPLATE_ERRORS as error:
            raise RowError(f"the chat template rejects it: {error}; correct the row or the template") from error
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
            marked = {**chat.messages[index], "content": f"{_OPEN}{answer}{_CLOSE}"}
            found, _ = self._apply((*chat.messages[:index], marked, *chat.messages[index + 1 :]), chat)
            start, end = found.find(_OPEN), found.find(_CLOSE) - len(_OPEN)
            if 0 <= start < end and found.replace(_OPEN, "").replace(_CLOSE, "") == text:
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


def load_chat_template(tokenizer: Any, given: str | None) -> ChatTemplate:
    """Return the given template or the model's own, after rendering a question and an answer with it."""
    if not tokenizer.is_fast:
        raise RunError(
            Reason.MODEL_UNSUPPORTED,
            "spec.model.uri: its tokenizer returns no offsets (it is not a fast tokenizer), which chat rows need; "
            "choose a model with a tokenizer.json",
        )
    field = "spec.dataset.chatTemplate" if given else "spec.model.uri"
    source = given or _own_template(tokenizer)
    template = ChatTemplate(tokenizer, source, has_generation_tags=bool(_GENERATION_TAG.search(source)))
    try:
        text, _ = template._apply((_QUESTION, {"role": "assistant", "content": _CLOSE}), _EMPTY_CHAT)
    except RowError as error:
        cause = error.__cause__
        line = f"line {cause.lineno}: " if isinstance(cause, TemplateSyntaxError) else ""
        raise RunError(
            Reason.INVALID_SPEC if given else Reason.MODEL_UNSUPPORTED,
            f"{field}: the chat template cannot render a question and its answer: {line}{cause}; correct it",
        ) from error
    return replace(template, stop_token=_first_special_token(text.partition(_CLOSE)[2], tokenizer))


def _own_template(tokenizer: Any) -> str:
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        raise RunError(
            Reason.MODEL_UNSUPPORTED,
            "spec.model.uri: the model has no chat template, and chat rows need one; set spec.dataset.chatTemplate, "
            "or choose a model that is trained for chat",
        ) from error


def _first_special_token(tail: str, tokenizer: Any) -> str:
    """Return the text of the first special token that a template puts after an answer; empty if there is none."""
    special = {content.content for content in tokenizer.added_tokens_decoder.values() if content.special}
    found = [(start, -len(token), token) for token in special if (start := tail.find(token)) >= 0]
    return min(found)[2] if found else ""


def end_of_turn_token(tokenizer: Any) -> int | None:
    """Return the id of the token that the tokenizer's own template puts after an answer; None if there is none."""
    if not tokenizer.chat_template:
        return None
    try:
        stop = load_chat_template(tokenizer, None).stop_token
    except RunError:  # a template that cannot be rendered: with chat rows, prepare has already refused it
        return None
    token: int | None = tokenizer.convert_tokens_to_ids(stop) if stop else None
    return token


def encode_chats(
    chats: Sequence[Chat], template: ChatTemplate, loss: str, with_prompt: Sequence[bool] | None = None
) -> list[TokenRow | RowError]:
    """Encode conversations as token rows; those that the template rejects become errors.

    Only validation rows need a prompt, and skipping the others saves half of the tokens.
    """
    flags = with_prompt or [True] * len(chats)
    rendered = [_try_render(template, chat, with_prompt=flag) for chat, flag in zip(chats, flags, strict=True)]
    valid = [(item, flag) for item, flag in zip(rendered, flags, strict=True) if isinstance(item, RenderedChat)]
    # The template writes the special tokens, so the tokenizer must not add its own: there would be two start tokens.
    tokens = iter(_tokenize(template.tokenizer, [item.text for item, _ in valid]))
    prompts = iter(chat_prompt_ids([item.prompt for item, flag in valid if flag], template.tokenizer))
    return [
        item
        if isinstance(item, RowError)
        else _to_token_row(item, next(tokens), next(prompts) if flag else None, template, loss)
        for item, flag in zip(rendered, flags, strict=True)
    ]


def chat_prompt_ids(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Return the token ids of rendered prompts; no special tokens are added."""
    return [tokens.ids for tokens in _tokenize(tokenizer, list(texts))]


def _try_render(template: ChatTemplate, chat: Chat, *, with_prompt: bool) -> RenderedChat | RowError:
    try:
        return template.render(chat, with_prompt=with_prompt)
    except RowError as error:
        return error


class _TokenizedText(NamedTuple):
    ids: list[int]
    offsets: list[Span]
    """Character span of each token."""


def _tokenize(tokenizer: Any, texts: list[str]) -> list[_TokenizedText]:
    if not texts:
        return []
    encoded = tokenize(tokenizer, texts, add_special_tokens=False, return_offsets_mapping=True)
    return [_TokenizedText(*pair) for pair in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)]


def _to_token_row(
    rendered: RenderedChat, tokens: _TokenizedText, prompt: list[int] | None, template: ChatTemplate, loss: str
) -> TokenRow:
    turns = [_token_span(tokens.offsets, turn) for turn in rendered.assistant_spans]
    if loss == "completion":
        turns = turns[-1:]
    ids, turns = _with_stop_token(tokens.ids, turns, template)
    label_spans = [(1, len(ids))] if loss == "all" else turns
    if prompt is None:
        return TokenRow(tuple(ids), tuple(label_spans))
    return TokenRow(tuple(ids), tuple(label_spans), tuple(prompt), rendered.prompt, rendered.answer)


def _token_span(offsets: Sequence[Span], turn: Span) -> Span:
    """Return the tokens that contain any character of a turn; a token across the boundary belongs to the answer."""
    start = bisect_right(offsets, turn[0], key=lambda offset: offset[1])
    return max(start, 1), bisect_left(offsets, turn[1], key=lambda offset: offset[0])


def _with_stop_token(ids: list[int], turns: list[Span], template: ChatTemplate) -> tuple[list[int], list[Span]]:
    """Make the end of the last answer a label: a model that never saw one does not stop."""
    tokenizer = template.tokenizer
    stops = (
        {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(template.stop_token)} if template.stop_token else set()
    )
    if turns and ids[turns[-1][1] - 1] in stops:
        return ids, turns
    end = len(ids)
    *earlier, last = turns or [(end, end)]
    added = [(last[0], end + 1)] if last[1] == end else [last, (end, end + 1)]
    return [*ids, tokenizer.eos_token_id], [*earlier, *added]
