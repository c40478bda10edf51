"""Conversations through a chat template to token rows, and which of the tokens are the assistant's."""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

from jinja2.exceptions import TemplateError, TemplateSyntaxError
from transformers.utils.chat_template_utils import render_jinja_template

from qlora_api.reasons import Reason
from qlora_trainer.data.rows import Chat, Message, RowError
from qlora_trainer.data.tokenization import Span, TokenRow
from qlora_trainer.errors import RunError

_OPEN, _CLOSE = "\ue000", "\ue001"
"""Private-use characters that mark an answer while it passes through a template."""
_GENERATION_TAG: Final = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""The tag with which a template itself says what the assistant makes."""
_TEMPLATE_ERRORS: Final = (
    TemplateError, TypeError, ValueError, KeyError, AttributeError, ArithmeticError, RecursionError,
)  # fmt: skip
"""What a template can end with; its sandbox calls a range too large an OverflowError."""
_EMPTY_CHAT: Final = Chat(())
_QUESTION: Final[Message] = {"role": "user", "content": "Hello"}


class RenderedChat(NamedTuple):
    """A conversation as text, and where in it the assistant's turns are, each up to its stop token."""

    text: str
    assistant_spans: tuple[Span, ...]
    prompt: str
    """Everything before the last answer, up to the words that ask for it; empty where nobody needed it."""
    answer: str


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template, and the token that ends a turn in it."""

    tokenizer: Any
    source: str
    has_generation_tags: bool
    """Whether the template marks the assistant's words itself."""
    stop_token: str = ""
    """Text of the special token behind an answer; empty if the template puts none there."""

    def render(self, chat: Chat, *, with_prompt: bool = True) -> RenderedChat:
        """Return a conversation as the model sees it, or raise RowError; one that is learned from is not asked."""
        text, tagged = self._apply(chat.messages, chat)
        # Without tags the prompt tells where the last answer starts.
        prompt = self.render_prompt(chat.messages[:-1], chat) if with_prompt or not self.has_generation_tags else ""
        answer = str(chat.messages[-1]["content"])
        turns = tagged if self.has_generation_tags else self._assistant_spans(chat, text, prompt)
        return RenderedChat(text, tuple(self._extend_to_stop_token(text, turn) for turn in turns), prompt, answer)

    def render_prompt(self, messages: Sequence[Message], chat: Chat = _EMPTY_CHAT) -> str:
        """Return messages up to the words that ask for an answer, or raise RowError; chat has the tools."""
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
            raise RowError(f"the chat template refuses it: {error}; correct the row or the template") from error
        return text, list(spans[0]) if self.has_generation_tags else []

    def _assistant_spans(self, chat: Chat, text: str, prompt: str) -> list[Span]:
        *earlier, last = (place for place, message in enumerate(chat.messages) if message["role"] == "assistant")
        turns = [self._assistant_span(chat, place, text) for place in earlier]
        return [
            *turns,
            (len(prompt), len(text)) if text.startswith(prompt) else self._find_by_markers(chat, last, text),
        ]

    def _assistant_span(self, chat: Chat, place: int, text: str) -> Span:
        """Find an answer by what the conversation is without it and with it."""
        before, _ = self._apply(chat.messages[:place], chat, add_generation_prompt=True)
        after, _ = self._apply(chat.messages[: place + 1], chat)
        if text.startswith(before) and text.startswith(after):
            return len(before), len(after)
        return self._find_by_markers(chat, place, text)

    def _find_by_markers(self, chat: Chat, place: int, text: str) -> Span:
        """Find an answer in a template that renders an earlier turn otherwise than the last: by marks around it."""
        content = chat.messages[place]["content"]
        for answer in (content, content.strip()):
            marked = {**chat.messages[place], "content": f"{_OPEN}{answer}{_CLOSE}"}
            found, _ = self._apply((*chat.messages[:place], marked, *chat.messages[place + 1 :]), chat)
            start, end = found.find(_OPEN), found.find(_CLOSE) - len(_OPEN)
            if 0 <= start < end and found.replace(_OPEN, "").replace(_CLOSE, "") == text:
                return start, end
        raise RowError(
            f"the chat template rewrites messages[{place}], so that its tokens cannot be told; put {{% generation %}} "
            "around the answer in spec.dataset.chatTemplate"
        )

    def _extend_to_stop_token(self, text: str, turn: Span) -> Span:
        """Let a turn end with its stop token: neither before it, nor with the line break behind it."""
        start, end = turn
        if not self.stop_token:
            return turn
        inside = text.rfind(self.stop_token, start, end)
        if inside >= 0 and not text[inside + len(self.stop_token) : end].strip():
            return start, inside + len(self.stop_token)
        behind = re.compile(r"\s*" + re.escape(self.stop_token)).match(text, end)
        return (start, behind.end()) if behind else turn


def load_chat_template(tokenizer: Any, given: str | None) -> ChatTemplate:
    """Return the given template or the model's own, proven on a question and its answer."""
    if not tokenizer.is_fast:
        raise RunError(
            Reason.MODEL_UNSUPPORTED,
            "spec.model.uri: its tokenizer does not tell where tokens lie in the text, which chat rows need; choose a "
            "model with a tokenizer.json",
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
            "spec.model.uri: the model has no chat template, and chat rows need one; give spec.dataset.chatTemplate, "
            "or choose a model that was tuned for chats",
        ) from error


def _first_special_token(tail: str, tokenizer: Any) -> str:
    """Return the first special token of what a template puts behind an answer, as text."""
    special = {content.content for content in tokenizer.added_tokens_decoder.values() if content.special}
    found = [(place, -len(token), token) for token in special if (place := tail.find(token)) >= 0]
    return min(found)[2] if found else ""


def end_of_turn_token(tokenizer: Any) -> int | None:
    """Return the token that the tokenizer's own template puts behind an answer, if it has a template that does."""
    if not tokenizer.chat_template:
        return None
    try:
        stop = load_chat_template(tokenizer, None).stop_token
    except RunError:  # a template that renders nothing: prepare refused it where rows are chats, and here are none
        return None
    token: int | None = tokenizer.convert_tokens_to_ids(stop) if stop else None
    return token


def encode_chats(
    chats: Sequence[Chat], template: ChatTemplate, loss: str, with_prompt: Sequence[bool] | None = None
) -> list[TokenRow | RowError]:
    """Turn conversations into token rows, those that the template refuses into errors.

    Only those that are asked get a prompt: half of the tokens, for the few rows that are held out.
    """
    wanted = with_prompt or [True] * len(chats)
    rendered = [_try_render(template, chat, with_prompt=ask) for chat, ask in zip(chats, wanted, strict=True)]
    good = [(item, ask) for item, ask in zip(rendered, wanted, strict=True) if isinstance(item, RenderedChat)]
    # The template writes the special tokens, so the tokenizer must not add its own: two start tokens are one too many.
    tokens = iter(_tokenize(template.tokenizer, [item.text for item, _ in good]))
    prompts = iter(chat_prompt_ids([item.prompt for item, ask in good if ask], template.tokenizer))
    return [
        item
        if isinstance(item, RowError)
        else _to_token_row(item, next(tokens), next(prompts) if ask else None, template, loss)
        for item, ask in zip(rendered, wanted, strict=True)
    ]


def chat_prompt_ids(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Return the tokens of what a chat template rendered."""
    return [tokens.ids for tokens in _tokenize(tokenizer, list(texts))]


def _try_render(template: ChatTemplate, chat: Chat, *, with_prompt: bool) -> RenderedChat | RowError:
    try:
        return template.render(chat, with_prompt=with_prompt)
    except RowError as error:
        return error


class _TokenizedText(NamedTuple):
    ids: list[int]
    offsets: list[Span]
    """Where in the text each token lies."""


def _tokenize(tokenizer: Any, texts: list[str]) -> list[_TokenizedText]:
    if not texts:
        return []
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    return [_TokenizedText(*pair) for pair in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)]


def _to_token_row(
    rendered: RenderedChat, tokens: _TokenizedText, prompt: list[int] | None, template: ChatTemplate, loss: str
) -> TokenRow:
    turns = [_token_span(tokens.offsets, turn) for turn in rendered.assistant_spans]
    if loss == "completion":
        turns = turns[-1:]
    ids, turns = _with_stop_token(tokens.ids, turns, template)
    learned = [(1, len(ids))] if loss == "all" else turns
    if prompt is None:
        return TokenRow(tuple(ids), tuple(learned))
    return TokenRow(tuple(ids), tuple(learned), tuple(prompt), rendered.prompt, rendered.answer)


def _token_span(offsets: Sequence[Span], turn: Span) -> Span:
    """Return the tokens that hold any character of a turn; a token across the seam is the answer's."""
    start = bisect_right(offsets, turn[0], key=lambda offset: offset[1])
    return max(start, 1), bisect_left(offsets, turn[1], key=lambda offset: offset[0])


def _with_stop_token(ids: list[int], turns: list[Span], template: ChatTemplate) -> tuple[list[int], list[Span]]:
    """Make sure that the last answer's end is learned: a model that never saw it never stops."""
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
