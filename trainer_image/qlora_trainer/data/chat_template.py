"""Encodes conversations with a chat template: tokenizes what it renders and labels the assistant's tokens."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Final, NamedTuple

from qlora_api.reasons import Reason
from qlora_trainer.data.chat_parts import RenderedChat
from qlora_trainer.data.chat_renderer import ChatRenderer, TemplateRejectionError
from qlora_trainer.data.render_process import RENDER_PROCESS, Call, RenderLimitError
from qlora_trainer.data.rendered_fields import CLOSE
from qlora_trainer.data.rows import MAX_TEXT_BYTES, Chat, Message, RowError
from qlora_trainer.data.tokenization import Span, TokenRow, tokenize, without_end_token
from qlora_trainer.errors import RunError
from qlora_trainer.storage.store import MODEL_FIELD

_MAX_TEMPLATE_CHARACTERS: Final = 1_000_000
"""Of a chat template: published ones have tens of thousands at most. Jinja takes seconds to compile so many."""
_EMPTY_CHAT: Final = Chat(())
_QUESTION: Final[Message] = {"role": "user", "content": "Hello"}


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template and its end-of-turn token."""

    tokenizer: Any
    source: str
    stop_token: str = ""
    """Text of the special token after an answer; empty if the template has none."""
    field: str = MODEL_FIELD.field
    """Field or option that the template comes from, for messages."""
    reason: Reason = Reason.MODEL_UNSUPPORTED
    """Reason of a run that the template ends."""
    tools_source: str = ""
    """The model's template for conversations with tools; empty if it has one for all."""

    @property
    def end_tokens(self) -> tuple[str, ...]:
        """Return the texts of the tokens that may end an answer; none if the template puts none after it."""
        return (self.stop_token, str(self.tokenizer.eos_token or self.stop_token)) if self.stop_token else ()

    def render_prompt(self, messages: Sequence[Message], chat: Chat = _EMPTY_CHAT) -> str:
        """Render messages with the generation prompt and the tools of `chat`, or raise RowError."""
        return self._render_one(Call("render_prompt", (messages, chat)))

    def render_answered(self, messages: Sequence[Message]) -> str:
        """Render messages that end with an answer, or raise RowError."""
        return self._render_one(Call("render_messages", (messages, _EMPTY_CHAT)))

    def render(
        self, chats: Sequence[Chat], with_prompt: Sequence[bool], loss: str
    ) -> list[list[RenderedChat] | RowError]:
        """Render each conversation, in several parts where the template rewrites earlier answers."""
        calls = [
            Call("render", (chat,), {"with_prompt": flag, "loss": loss})
            for chat, flag in zip(chats, with_prompt, strict=True)
        ]
        return [
            item if isinstance(item, RowError) else [_to_rendered_chat(*part) for part in item]
            for item in self._call(calls)
        ]

    def _render_one(self, call: Call) -> str:
        (text,) = self._call([call])
        if isinstance(text, RowError):
            raise text
        return str(text)

    def _call(self, calls: Sequence[Call]) -> list[Any]:
        renderer = ChatRenderer(self.source, self.tokenizer.special_tokens_map, self.stop_token, self.tools_source)
        try:
            return RENDER_PROCESS.render(renderer, calls)
        except RenderLimitError as error:
            raise RunError(self.reason, f"{self.field}: the chat template {error}; correct it") from error


def _to_rendered_chat(
    text: str, spans: list[list[int]], masked: list[list[int]], prompt: str, answer: str
) -> RenderedChat:
    """Return a rendered conversation from its JSON, which has no tuples."""
    return RenderedChat(text, _to_spans(spans), _to_spans(masked), prompt, answer)


def _to_spans(pairs: list[list[int]]) -> tuple[Span, ...]:
    return tuple((start, end) for start, end in pairs)


def load_chat_template(tokenizer: Any, given: str | None, field: str = MODEL_FIELD.field) -> ChatTemplate:
    """Return the given template or the model's own, after rendering a question and an answer with it.

    `field` names what the tokenizer comes from.
    """
    if not tokenizer.is_fast:
        raise RunError(
            Reason.MODEL_UNSUPPORTED,
            f"{field}: its tokenizer returns no offsets (it is not a fast tokenizer), which chat rows need; "
            "choose a model with a tokenizer.json",
        )
    source, tools_source = (given, "") if given else _own_templates(tokenizer, field)
    reason = Reason.INVALID_SPEC if given else Reason.MODEL_UNSUPPORTED
    template = ChatTemplate(
        tokenizer,
        source,
        field="spec.dataset.chatTemplate" if given else field,
        reason=reason,
        tools_source=tools_source,
    )
    if max(len(source), len(tools_source)) > _MAX_TEMPLATE_CHARACTERS:
        raise RunError(
            reason,
            f"{template.field}: the chat template has more than {_MAX_TEMPLATE_CHARACTERS:,} characters; shorten it",
        )
    try:
        text = template.render_answered((_QUESTION, {"role": "assistant", "content": CLOSE}))
        tail = text.partition(CLOSE)[2]
        stop_token = _first_special_token(tail, tokenizer)
        _check_end(template, tail.partition(stop_token)[2] if stop_token else tail)
    except TemplateRejectionError as error:
        line = f"line {error.line}: " if error.line is not None else ""
        raise RunError(
            reason,
            f"{template.field}: the chat template cannot render a question and its answer: {line}{error.error}; "
            "correct it",
        ) from error
    except RowError as error:  # too much text
        raise RunError(reason, f"{template.field}: with a question and an answer, {error}") from error
    return replace(template, stop_token=stop_token)


def _check_end(template: ChatTemplate, rest: str) -> None:
    """Raise RunError if the template begins another answer after the last: `rest` is what follows its stop token."""
    if rest.strip() and template.render_prompt((_QUESTION,)).endswith(rest):
        raise RunError(
            template.reason,
            f"{template.field}: the chat template ends every conversation with the generation prompt {rest!r}, which "
            "would be learned as part of the answer; put it between {% if add_generation_prompt %} and {% endif %} "
            "in spec.dataset.chatTemplate",
        )


_DEFAULT, _TOOL_USE = "default", "tool_use"
"""Names that transformers gives to a model's templates, where it has several."""


def _own_templates(tokenizer: Any, field: str) -> tuple[str, str]:
    """Return the model's template, and the one that it has for conversations with tools; empty if it is the same."""
    own = tokenizer.chat_template
    if not own:
        raise RunError(
            Reason.MODEL_UNSUPPORTED,
            f"{field}: the model has no chat template, and chat rows need one; set spec.dataset.chatTemplate, "
            "or choose a model that is trained for chat",
        )
    if isinstance(own, str):
        return own, ""
    if _DEFAULT not in own and len(own) > 1:
        raise RunError(
            Reason.MODEL_UNSUPPORTED,
            f"{field}: none of the model's chat templates ({', '.join(sorted(own))}) is named default; set "
            "spec.dataset.chatTemplate to the one that fits",
        )
    return str(own.get(_DEFAULT, next(iter(own.values())))), str(own.get(_TOOL_USE, ""))


def _first_special_token(tail: str, tokenizer: Any) -> str:
    """Return the text of the first special token that a template puts after an answer; empty if there is none."""
    special = {content.content for content in tokenizer.added_tokens_decoder.values() if content.special}
    found = [(start, -len(token), token) for token in special if (start := tail.find(token)) >= 0]
    return min(found)[2] if found else ""


def end_of_turn_token(tokenizer: Any) -> int | None:
    """Return the id of the token that the tokenizer's own template puts after an answer; None if there is none."""
    if not tokenizer.chat_template:
        return None
    stop = _own_stop_token(tokenizer, str(tokenizer.chat_template))
    token: int | None = tokenizer.convert_tokens_to_ids(stop) if stop else None
    return token


@lru_cache(maxsize=2)
def _own_stop_token(tokenizer: Any, _source: str) -> str:
    """Render once: every batch of answers asks, and a template that does not end would take its time each time."""
    try:
        return load_chat_template(tokenizer, None).stop_token
    except RunError:  # a template that cannot be rendered: with chat rows, prepare has already refused it
        return ""


def encode_chats(
    chats: Sequence[Chat], template: ChatTemplate, loss: str, with_prompt: Sequence[bool] | None = None
) -> list[TokenRow | RowError]:
    """Encode conversations as token rows; those that the template rejects become errors.

    Only validation rows need a prompt, and skipping the others saves half of the tokens.
    """
    flags = with_prompt or [True] * len(chats)
    chats = [_without_end_tokens(chat, template) for chat in chats]
    rendered = template.render(chats, flags, loss)
    parts = [
        # An earlier part ends with an answer that is learned.
        _Part(found, flag, loss, len(chat.messages) - 1 not in chat.masked)
        if found is item[-1]
        else _Part(found, flag, "assistant", learns_end=True)
        for chat, item, flag in zip(chats, rendered, flags, strict=True)
        if not isinstance(item, RowError)
        for found in item
    ]
    encoded = (row for batch in _batches(parts) for row in _encode_parts(batch, template))
    return [item if isinstance(item, RowError) else _join_parts([next(encoded) for _ in item]) for item in rendered]


def _without_end_tokens(chat: Chat, template: ChatTemplate) -> Chat:
    """Return the conversation without end tokens that its answers have in their text, if the template adds its own."""
    ends = template.end_tokens
    if not ends or not any(end in message["content"] for message in chat.messages for end in ends):
        return chat
    messages = tuple(
        {**message, "content": without_end_token(message["content"], ends)}
        if message["role"] == "assistant"
        else message
        for message in chat.messages
    )
    return replace(chat, messages=messages)


class _Part(NamedTuple):
    """A rendered conversation, or the start of one up to an earlier answer, and how it is encoded."""

    rendered: RenderedChat
    with_prompt: bool
    loss: str
    learns_end: bool
    """Whether the answer that it ends with is trained on."""


def _batches(parts: Sequence[_Part]) -> Iterator[list[_Part]]:
    """Yield parts whose text can be tokenized at once: a conversation of many parts is a multiple of its row."""
    batch: list[_Part] = []
    size = 0
    for part in parts:
        size += len(part.rendered.text)
        if batch and size > MAX_TEXT_BYTES:
            yield batch
            batch, size = [], len(part.rendered.text)
        batch.append(part)
    if batch:
        yield batch


def _encode_parts(parts: Sequence[_Part], template: ChatTemplate) -> Iterator[TokenRow]:
    # The template writes the special tokens, so the tokenizer must not add its own: there would be two start tokens.
    tokens = _tokenize(template.tokenizer, [part.rendered.text for part in parts])
    texts = [part.rendered.prompt for part in parts if part.with_prompt]
    prompts = iter(chat_prompt_ids(texts, template.tokenizer))
    for part, encoded in zip(parts, tokens, strict=True):
        yield _to_token_row(part, encoded, next(prompts) if part.with_prompt else None, template)


def _join_parts(parts: Sequence[TokenRow]) -> TokenRow:
    """Return the row of the whole conversation, with those of its earlier answers."""
    *earlier, whole = (part for part in parts if part.label_spans)
    return replace(whole, earlier=tuple(earlier)) if earlier else whole


def chat_prompt_ids(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Return the token ids of rendered prompts; no special tokens are added."""
    return [tokens.ids for tokens in _tokenize(tokenizer, list(texts))]


class _TokenizedText(NamedTuple):
    ids: list[int]
    offsets: list[Span]
    """Character span of each token."""


def _tokenize(tokenizer: Any, texts: list[str]) -> list[_TokenizedText]:
    if not texts:
        return []
    encoded = tokenize(tokenizer, texts, add_special_tokens=False, return_offsets_mapping=True)
    return [_TokenizedText(*pair) for pair in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)]


def _to_token_row(part: _Part, tokens: _TokenizedText, prompt: list[int] | None, template: ChatTemplate) -> TokenRow:
    rendered, ids = part.rendered, tokens.ids
    turns = [_token_span(tokens.offsets, turn) for turn in rendered.assistant_spans]
    if part.loss == "completion":
        turns = turns[-1:]
    if part.learns_end:
        ids, turns = _with_stop_token(ids, turns, template)
    masked = [_token_span(tokens.offsets, turn) for turn in rendered.masked_spans]
    label_spans = _all_but(masked, len(ids)) if part.loss == "all" else turns
    if prompt is None:
        return TokenRow(tuple(ids), tuple(label_spans))
    return TokenRow(tuple(ids), tuple(label_spans), tuple(prompt), rendered.prompt, rendered.answer)


def _all_but(masked: Sequence[Span], length: int) -> list[Span]:
    """Return the spans of all tokens but the first and the masked ones."""
    starts = [1, *(end for _, end in masked)]
    ends = [*(start for start, _ in masked), length]
    return [(start, end) for start, end in zip(starts, ends, strict=True) if start < end]


def _token_span(offsets: Sequence[Span], turn: Span) -> Span:
    """Return the tokens that contain any character of a turn; a token across the boundary belongs to the answer."""
    start = bisect_right(offsets, turn[0], key=lambda offset: offset[1])
    return max(start, 1), bisect_left(offsets, turn[1], key=lambda offset: offset[0])


def _with_stop_token(ids: list[int], turns: list[Span], template: ChatTemplate) -> tuple[list[int], list[Span]]:
    """Make the end of the last answer a label: a model that never saw one does not stop."""
    tokenizer = template.tokenizer
    stops = {tokenizer.eos_token_id, *map(tokenizer.convert_tokens_to_ids, template.end_tokens)}
    if turns and ids[turns[-1][1] - 1] in stops:
        return ids, turns
    end = len(ids)
    *earlier, last = turns or [(end, end)]
    added = [(last[0], end + 1)] if last[1] == end else [last, (end, end + 1)]
    return [*ids, tokenizer.eos_token_id], [*earlier, *added]
