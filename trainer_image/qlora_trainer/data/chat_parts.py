"""Renders a conversation in as many parts as its answers need; runs in the child process of render_process."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

from qlora_trainer.data.answer_spans import AnswerFinder, Template, extend_to_stop_token, head_of_answer, tagged_spans
from qlora_trainer.data.rendered_fields import FieldCheck, contains, dropped, has_other_fields
from qlora_trainer.data.rows import Chat, RowError
from qlora_trainer.data.tokenization import Span

_OPENING_TAG: Final = re.compile(r"\s*(<[A-Za-z_]+>)")


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


@dataclass(frozen=True)
class _Part:
    """A conversation, or its start up to an earlier answer, as it is learned from."""

    chat: Chat
    text: str
    prompt: str
    spans: Mapping[int, list[Span]]
    """Of the answers that are located: the last, or all that the template marks itself."""
    check: FieldCheck
    """Renders changed conversations as `text` is rendered."""
    lost: Mapping[int, str]
    """Messages that are not in the text, each with its dropped field."""


@dataclass(frozen=True)
class ChatParts:
    """The parts of a conversation: the whole, and the start up to each answer that the whole renders otherwise."""

    template: Template
    chat: Chat
    check: FieldCheck
    characters: Sequence[str]
    """Two for each message, none of them in the conversation."""
    with_prompt: bool

    def render(self, pending: Sequence[int], masked: Sequence[int]) -> list[RenderedChat]:
        """Return the parts from which the pending answers are learned, the whole conversation last."""
        last = len(self.chat.messages) - 1
        whole = self._render_part(self.chat, range(last), learned=last in pending)
        # An answer whose prompt has what is not in the whole conversation.
        shown = self._first_that_shows(whole.lost) if whole.lost else None
        finder = AnswerFinder(self.template, self.chat, whole.text, whole.check, self.characters)
        spans, parts = dict(whole.spans), []
        for index in pending[:-1] if last in pending else pending:
            spans.pop(index, None)
            found = [] if index == shown else self._label_spans_of(whole, index, finder)
            if found:
                spans[index] = found
            else:
                parts.append(self._render_start(index, whole.lost))
        for index in masked:
            if index not in spans and (span := finder.find(index) if index < last else None):
                spans[index] = [span]
            if index not in spans:
                raise RowError(f"messages[{index}] has the weight 0, and the chat template rewrites it; remove the row")
        return [*(self._finish(part) for part in parts), self._finish(replace(whole, spans=spans), pending, masked)]

    def _label_spans_of(self, whole: _Part, index: int, finder: AnswerFinder) -> list[Span]:
        """Return the spans of an answer in the whole conversation; none if not all of it is there."""
        if whole.check.dropped_field(self.chat, index, whole.text):
            return []
        spans = list(whole.spans.get(index, ()))
        if not spans and (span := finder.find(index)):
            spans = [span]
        content = self.chat.messages[index]["content"]
        texts = [whole.text[start:end] for start, end in spans]
        if contains(whole.text, content) and not any(contains(text, content) for text in texts):
            return []  # another message says the same
        return spans

    def _finish(self, part: _Part, learned: Sequence[int] | None = None, masked: Sequence[int] = ()) -> RenderedChat:
        """Return a part with the spans of some answers, of its last without `learned`, each up to its stop token."""
        last = len(part.chat.messages) - 1
        assistant, untrained = (
            tuple(sorted({
                extend_to_stop_token(part.text, span, self.template.stop_token)
                for index in answers for span in part.spans.get(index, ())
            }))
            for answers in ([last] if learned is None else learned, masked)
        )  # fmt: skip
        prompt = part.prompt if self.with_prompt else ""
        return RenderedChat(part.text, assistant, untrained, prompt, str(part.chat.messages[-1]["content"]))

    def _render_start(self, index: int, lost: Mapping[int, str]) -> _Part:
        """Render the start of the conversation up to an answer; some messages may be dropped, as in the whole."""
        messages = self.chat.messages
        previous = max((found for found in range(index) if messages[found]["role"] == "assistant"), default=-1)
        system = [0] if messages[0]["role"] == "system" and previous >= 0 else []
        part = self._render_part(self._start(index), [*system, *range(previous + 1, index)], learned=True)
        if missing := [found for found in part.lost if found not in lost]:
            raise dropped(f"messages[{missing[0]}].{part.lost[missing[0]]}")
        return part

    def _start(self, index: int) -> Chat:
        masked = tuple(found for found in self.chat.masked if found <= index)
        return Chat(self.chat.messages[: index + 1], self.chat.tools, masked)

    def _render_part(self, chat: Chat, context: Iterable[int], *, learned: bool) -> _Part:
        """Render a conversation, and check these messages before its last answer."""
        text, tags = self.template.render_tagged(chat)
        self.check.check_tools(chat, text)
        lost = self.check.dropped_context(chat, text, context)
        # Without tags, the end of the prompt is the start of the last answer.
        prompt = self.template.render_prompt(chat.messages[:-1], chat) if self.with_prompt or tags is None else ""
        last = len(chat.messages) - 1
        spans = self._last_span(chat, text, prompt) if tags is None else tagged_spans(chat, tags)
        part = _Part(chat, text, prompt, spans, self.check, lost)
        hidden = self.check.dropped_field(chat, last, text) if learned else None
        if lost and not hidden and (found := self._with_context(part)):
            return found
        if learned and (hidden or last not in spans):
            return self._after_prompt(part, *self._write_answer(chat, hidden))
        return part

    def _last_span(self, chat: Chat, text: str, prompt: str) -> dict[int, list[Span]]:
        last = len(chat.messages) - 1
        if text.startswith(prompt):
            return {last: [(len(prompt), len(text))]}
        # It does not follow the prompt, but what precedes the text of any answer.
        head, mark, _ = head_of_answer(self.template, chat.messages[:-1], chat, self.check.marks)
        if mark and text.startswith(head):
            return {last: [(len(head), len(text))]}
        span = AnswerFinder(self.template, chat, text, self.check, self.characters).find_by_marks(last)
        return {last: [span]} if span else {}

    def _after_prompt(self, part: _Part, tail: str, answer: int) -> _Part:
        """Return a part with the generation prompt before its last answer; `answer` is the length of it in `tail`."""
        prompt = part.prompt or self.template.render_prompt(part.chat.messages[:-1], part.chat)

        def render(changed: Chat) -> str:
            return self.template.render_prompt(changed.messages[:-1], changed) + tail

        check, text = FieldCheck(render, self.check.marks), prompt + tail
        spans = {len(part.chat.messages) - 1: [(len(prompt), len(prompt) + answer)]}
        return _Part(part.chat, text, prompt, spans, check, check.dropped_context(part.chat, text, part.lost))

    def _with_context(self, part: _Part) -> _Part | None:
        """Return a part with what only its prompt has: some templates put the system message before the last question.

        None if the prompt does not have it either.
        """
        kept = tuple(message for index, message in enumerate(part.chat.messages[:-1]) if index not in part.lost)
        try:
            head = self.template.render_prompt(kept, part.chat)
            answer = part.text.removeprefix(head)
            found = self._after_prompt(part, answer, len(answer))
        except RowError:  # the template takes no such conversation
            return None
        return found if part.text.startswith(head) and not found.lost else None

    def _first_that_shows(self, lost: Mapping[int, str]) -> int:
        """Return the first answer whose prompt has these messages, or raise RowError."""
        for index, message in enumerate(self.chat.messages[:-1]):
            if message["role"] != "assistant" or index < max(lost):
                continue
            start = self._start(index)
            text = self.template.render_prompt(start.messages[:-1], start)
            check = FieldCheck(
                lambda changed: self.template.render_prompt(changed.messages[:-1], changed), self.check.marks
            )
            if not check.dropped_context(start, text, lost):
                return index
        index, name = next(iter(lost.items()))
        raise dropped(f"messages[{index}].{name}")

    def _write_answer(self, chat: Chat, dropped_field: str | None) -> tuple[str, int]:
        """Return the last answer as a model writes it, and its length without what ends it.

        It follows the generation prompt, as when the model is served. What ends it is what ends any other answer.
        """
        last = len(chat.messages) - 1
        message = chat.messages[last]
        if dropped_field and (dropped_field != "content" or has_other_fields(message)):
            raise dropped(f"messages[{last}].{dropped_field}")
        _, mark, end = head_of_answer(self.template, chat.messages[:-1], chat, self.check.marks)
        if not mark or has_other_fields(message):
            raise RowError(
                f"the chat template rewrites messages[{last}], so its tokens cannot be located; put {{% generation %}} "
                "around the answer in spec.dataset.chatTemplate"
            )
        content = _without_repeated_tag(self.template.render_prompt(chat.messages[:-1], chat), message["content"])
        return content + end, len(content)


def _without_repeated_tag(prompt: str, content: str) -> str:
    """Return an answer without the tag that the generation prompt ends with, such as DeepSeek-R1's <think>."""
    tag = _OPENING_TAG.match(content)
    if tag is None or not prompt.rstrip().endswith(tag[1]):
        return content
    rest = content[tag.end() :]
    return rest.lstrip("\n") if prompt.endswith("\n") else rest
