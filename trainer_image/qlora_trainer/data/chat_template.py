"""Encodes conversations with a chat template: tokenizes what it renders and labels the assistant's tokens."""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Final, NamedTuple

from qlora_api.reasons import Reason
from qlora_trainer.data.chat_renderer import CLOSE, ChatRenderer, RenderedChat, TemplateRejectionError
from qlora_trainer.data.render_process import RENDER_PROCESS, Call, RenderLimitError
from qlora_trainer.data.rows import Chat, Message, RowError
from qlora_trainer.data.tokenization import Span, TokenRow, tokenize
from qlora_trainer.errors import RunError
from qlora_trainer.storage.store import MODEL_FIELD

_GENERATION_TAG: Final = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""The tag with which a template marks the assistant's output itself."""
_EMPTY_CHAT: Final = Chat(())
_QUESTION: Final[Message] = {"role": "user", "content": "Hello"}


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template and its end-of-turn token."""

    tokenizer: Any
    source: str
    has_generation_tags: bool
    """Whether the template marks the assistant's output with `{% generation %}`."""
    stop_token: str = ""
    """Text of the special token after an answer; empty if the template has none."""
    field: str = MODEL_FIELD.field
    """Field or option that the template comes from, for messages."""
    reason: Reason = Reason.MODEL_UNSUPPORTED
    """Reason of a run that the template ends."""

    def render_prompt(self, messages: Sequence[Message], chat: Chat = _EMPTY_CHAT) -> str:
        """Render messages with the generation prompt and the tools of `chat`, or raise RowError."""
        return self._render_one(Call("render_prompt", (messages, chat)))

    def render_answered(self, messages: Sequence[Message]) -> str:
        """Render messages that end with an answer, or raise RowError."""
        return self._render_one(Call("render_messages", (messages, _EMPTY_CHAT)))

    def render(self, chats: Sequence[Chat], with_prompt: Sequence[bool]) -> list[RenderedChat | RowError]:
        """Render conversations; training rows need no prompt."""
        calls = [Call("render", (chat,), {"with_prompt": flag}) for chat, flag in zip(chats, with_prompt, strict=True)]
        return [item if isinstance(item, RowError) else _to_rendered_chat(*item) for item in self._call(calls)]

    def _render_one(self, call: Call) -> str:
        (text,) = self._call([call])
        if isinstance(text, RowError):
            raise text
        return str(text)

    def _call(self, calls: Sequence[Call]) -> list[Any]:
        renderer = ChatRenderer(
            self.source, self.tokenizer.special_tokens_map, self.has_generation_tags, self.stop_token
        )
        try:
            return RENDER_PROCESS.render(renderer, calls)
        except RenderLimitError as error:
            raise RunError(self.reason, f"{self.field}: the chat template {error}; correct it") from error


def _to_rendered_chat(text: str, spans: list[list[int]], prompt: str, answer: str) -> RenderedChat:
    """Return a rendered conversation from its JSON, which has no tuples."""
    return RenderedChat(text, tuple((start, end) for start, end in spans), prompt, answer)


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
    source = given or _own_template(tokenizer, field)
    reason = Reason.INVALID_SPEC if given else Reason.MODEL_UNSUPPORTED
    template = ChatTemplate(
        tokenizer,
        source,
        has_generation_tags=bool(_GENERATION_TAG.search(source)),
        field="spec.dataset.chatTemplate" if given else field,
        reason=reason,
    )
    try:
        text = template.render_answered((_QUESTION, {"role": "assistant", "content": CLOSE}))
    except TemplateRejectionError as error:
        line = f"line {error.line}: " if error.line is not None else ""
        raise RunError(
            reason,
            f"{template.field}: the chat template cannot render a question and its answer: {line}{error.error}; "
            "correct it",
        ) from error
    return replace(template, stop_token=_first_special_token(text.partition(CLOSE)[2], tokenizer))


def _own_template(tokenizer: Any, field: str) -> str:
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        raise RunError(
            Reason.MODEL_UNSUPPORTED,
            f"{field}: the model has no chat template, and chat rows need one; set spec.dataset.chatTemplate, "
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
    rendered = template.render(chats, flags)
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
