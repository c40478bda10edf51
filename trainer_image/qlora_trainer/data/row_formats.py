"""Row formats: detected from the fields of a row, and parsed into examples, conversations or text."""

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final

from qlora_api.units import MIB
from qlora_api.v1alpha1 import RowFormat, RowTemplate
from qlora_trainer.data.chat_messages import is_messages, parse_chat
from qlora_trainer.data.json_values import parse_json_text
from qlora_trainer.data.rows import MAX_TEXT_BYTES, Example, Row, RowError, Text, check_size, text_of
from qlora_trainer.data.unsupported_fields import check_supported

_FORMAT_FIELDS: Final[tuple[tuple[str, RowFormat], ...]] = (
    ("messages", "chat"),
    ("conversations", "chat"),
    ("instruction", "instruction"),
    ("prompt", "completion"),
    ("text", "text"),
)
"""Field and the format it indicates; the first field that a row has decides."""
_ANSWER_FIELDS: Final = ("output", "response")
_CONTEXT_FIELDS: Final = ("input", "context")
_SYSTEM_FIELDS: Final = ("system", "system_prompt")
"""Fields with a text before the first block, where Alpaca has its preamble."""
_PREFERENCE_FIELDS: Final = frozenset({"chosen", "rejected"})
"""Fields of rows for DPO and its relatives."""
_PLACEHOLDER: Final = re.compile(r"\{([^{}]+)\}")


def detect_format(fields: Mapping[str, Any]) -> tuple[RowFormat, str]:
    """Return the format of a row and the field it was detected by, or raise RowError."""
    # A table of several formats has the columns of all; those of the others are null or empty.
    filled = [name for name in fields if fields[name] is not None and fields[name] != ""]
    found = next(((fmt, field) for names in (filled, fields) for field, fmt in _FORMAT_FIELDS if field in names), None)
    if fields.keys() >= _PREFERENCE_FIELDS and (found is None or found == ("completion", "prompt")):
        raise RowError(
            f"has the preference fields {', '.join(sorted(_PREFERENCE_FIELDS))}, of which nothing is learned; write "
            "the chosen answers as messages, or as prompt and completion"
        )
    if found == ("completion", "prompt") and is_messages(fields["prompt"]):
        return "chat", "prompt"
    if found is None:
        raise RowError(
            f"has the fields {', '.join(map(str, fields)) or '(none)'}; write messages (or conversations), instruction "
            "and output (or response), prompt and completion, or text; or set spec.dataset.template"
        )
    return found


def parse_row(fields: Mapping[str, Any], row_format: RowFormat, template: RowTemplate | None = None) -> Row:
    """Parse the fields of a row, or raise RowError that names the invalid field."""
    if template is not None:
        return check_size(Example(fill(template.prompt, fields, "prompt"), fill(template.answer, fields, "answer")))
    check_supported(fields, row_format)
    return check_size(_PARSERS[row_format](fields))


def _parse_instruction(fields: Mapping[str, Any]) -> Example:
    prompt = instruction_prompt(fields)
    answer = _one_of(fields, _ANSWER_FIELDS)
    if answer is None:
        raise RowError("field 'response' (or 'output') is missing; add it")
    return Example(prompt, text_of(fields, answer))


def instruction_prompt(fields: Mapping[str, Any]) -> str:
    """Return the prompt of an instruction row; the answer may be missing."""
    asked = render_instruction(text_of(fields, "instruction"), _optional(fields, _one_of(fields, _CONTEXT_FIELDS)))
    system = _optional(fields, _one_of(fields, _SYSTEM_FIELDS))
    return f"{system}\n\n" * bool(system) + _history(fields.get("history")) + asked


def _history(turns: Any) -> str:
    """Return the earlier questions and answers of an Alpaca row, each in the format of the last."""
    if isinstance(turns, str) and turns.strip():
        turns = parse_json_text(turns, "field 'history'")
    if not turns:
        return ""
    if not isinstance(turns, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in turns):
        raise RowError("field 'history' is not a list of [question, answer]; write [[…, …]], or remove it")
    texts = [{"question": question, "answer": answer} for question, answer in turns]
    for index, turn in enumerate(texts):
        for name in turn:
            text_of(turn, name, within=f"history[{index}]")
    return "".join(f"{render_instruction(turn['question'])}{turn['answer']}\n\n" for turn in texts)


def _one_of(fields: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    """Return the field that a row has of several; in a table that has all of them, the others are null or empty."""
    present = [name for name in names if fields.get(name) is not None] or [name for name in names if name in fields]
    filled = [name for name in present if fields[name] != ""]
    if len(filled) > 1:
        raise RowError(f"has both '{filled[0]}' and '{filled[1]}'; keep one")
    return next(iter([*filled, *present]), None)


def _optional(fields: Mapping[str, Any], name: str | None) -> str:
    if name is None or fields[name] is None or fields[name] == "":
        return ""
    return text_of(fields, name, blank=True).strip() and fields[name]


def render_instruction(instruction: str, context: str = "") -> str:
    """Return the prompt in the format of Alpaca, without its preamble."""
    block = f"### Input:\n{context}\n\n" if context else ""
    return f"### Instruction:\n{instruction}\n\n{block}### Response:\n"


def placeholders(template: str) -> tuple[str, ...]:
    """Return the field names in a template, without duplicates."""
    return tuple(dict.fromkeys(_PLACEHOLDER.findall(template)))


def fill(template: str, fields: Mapping[str, Any], part: str) -> str:
    """Fill a template with the fields of a row; single fields may be empty, the result must not be."""
    size = 0

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if name not in fields:
            known = ", ".join(map(str, fields))
            raise RowError(
                f"spec.dataset.template.{part} uses the field '{name}', but the row has {known}; correct one of them"
            )
        text = text_of(fields, name, blank=True)
        nonlocal size
        size += len(text)
        if size > MAX_TEXT_BYTES:
            raise RowError(f"spec.dataset.template.{part} renders more than {MAX_TEXT_BYTES // MIB} MiB; shorten it")
        return text

    filled = _PLACEHOLDER.sub(value, template)
    if not filled.strip():
        raise RowError(f"spec.dataset.template.{part} renders an empty text; fill its fields")
    return filled


def _parse_completion(fields: Mapping[str, Any]) -> Example:
    return Example(text_of(fields, "prompt"), text_of(fields, "completion"))


def render_question(formats: Collection[str], question: str, fields: Mapping[str, Any]) -> str:
    """Return a question in the prompt that rows of these formats were trained with.

    Args:
        formats: Row formats of the training set.
        question: The question as asked; it is the prompt itself where no format has a prompt of its own.
        fields: Fields of a row, where the question is one written as a JSON object; else empty.

    """
    render = next((_PROMPTS[row_format] for row_format in _PROMPTS if row_format in formats), None)
    return question if render is None else render(question, fields)


def _ask_instruction(question: str, fields: Mapping[str, Any]) -> str:
    return instruction_prompt(fields) if "instruction" in fields else render_instruction(question)


_PROMPTS: Final[dict[RowFormat, Callable[[str, Mapping[str, Any]], str]]] = {"instruction": _ask_instruction}
"""Formats whose rows are rendered into a prompt of their own."""
_PARSERS: Final[dict[RowFormat, Callable[[Mapping[str, Any]], Row]]] = {
    "instruction": _parse_instruction,
    "chat": parse_chat,
    "completion": _parse_completion,
    "text": lambda fields: Text(text_of(fields, "text")),
}
