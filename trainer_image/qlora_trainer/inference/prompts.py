"""Builds prompts for an adapter in the format of its training rows."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_api.reasons import Reason
from qlora_api.report import AdapterRecord
from qlora_api.v1alpha1 import RowTemplate
from qlora_trainer.data.chat_template import ChatTemplate, chat_prompt_ids, load_chat_template
from qlora_trainer.data.row_formats import fill, placeholders, render_question
from qlora_trainer.data.rows import Message, RowError
from qlora_trainer.data.tokenization import prompt_ids
from qlora_trainer.errors import RunError


@dataclass(frozen=True)
class PromptBuilder:
    """The prompt format that one adapter was trained on."""

    tokenizer: Any
    formats: frozenset[str]
    template: RowTemplate | None
    chat: ChatTemplate | None
    """None if no training row was a chat: then prompts have no history."""

    def build(self, messages: Sequence[Message]) -> list[int]:
        """Return the tokens of a prompt for an answer to the last message, or raise RunError."""
        try:
            if self.chat is not None:
                return chat_prompt_ids([self.chat.render_prompt(messages)], self.tokenizer)[0]
            return prompt_ids([self._render(str(messages[-1]["content"]))], self.tokenizer)[0]
        except RowError as error:
            raise RunError(Reason.INVALID_SPEC, f"the question: {error}") from error

    def _render(self, question: str) -> str:
        """Return a question as a prompt; a JSON object with the fields of a row is used as a row."""
        fields = _as_fields(question)
        if self.template is not None:
            return _fill_template(self.template.prompt, question, fields)
        return render_question(self.formats, question, fields)


def make_prompt_builder(record: AdapterRecord, tokenizer: Any, field: str = "--adapter") -> PromptBuilder:
    """Return the prompt format in an adapter's record; chat if any of its rows were chats.

    `field` names the option that gave the adapter.
    """
    formats = frozenset(record.format.split("+"))
    chat = load_chat_template(tokenizer, None, field) if "chat" in formats else None
    return PromptBuilder(tokenizer, formats, record.template, chat)


def _as_fields(question: str) -> Mapping[str, Any]:
    try:
        content = json.loads(question)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _fill_template(template: str, question: str, fields: Mapping[str, Any]) -> str:
    names = placeholders(template)
    if set(names) <= set(fields):
        return fill(template, fields, "prompt")
    if len(names) > 1:
        example = json.dumps(dict.fromkeys(names, "…"), ensure_ascii=False)
        raise RowError(f"the prompts of this adapter have the fields {', '.join(names)}; ask with {example}")
    return fill(template, {names[0]: question}, "prompt")
