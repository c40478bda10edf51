"""Fields beside the text of a row that change what other trainers learn from it, and that are not supported here."""

from collections.abc import Mapping
from typing import Any, Final

from qlora_api.v1alpha1 import RowFormat
from qlora_trainer.data.json_values import has_text, without_nulls
from qlora_trainer.data.rows import RowError

_MEDIA_FIELDS: Final = ("image", "images", "video", "videos", "audio", "audios")
_WANTED_FIELDS: Final = ("label", "kto_tag")
"""Whether an answer is one that a model should write: of rows for KTO, in TRL, ms-swift and LLaMA-Factory."""
_ROW_FLAGS: Final = ("weight", "train", "loss")
"""Fields that say how much is learned from a row, named as the flags of a message."""
_TEMPLATE_ARGUMENTS: Final = "chat_template_kwargs"
"""Arguments for the chat template, as TRL takes them from a row."""
_TOOL_FIELDS: Final = ("tools", "functions")
_CONTEXT_FIELDS: Final[Mapping[RowFormat, tuple[str, ...]]] = {
    "completion": ("system", "system_prompt", "history", *_TOOL_FIELDS),
    "instruction": _TOOL_FIELDS,
}
"""Parts of a prompt that a format has no place for."""
_EMPTY_JSON: Final = ("[]", "{}", "null")
"""Values of a text field that hold nothing, in datasets with nested values as JSON in text."""


def check_supported(fields: Mapping[str, Any], row_format: RowFormat) -> None:
    """Raise RowError if a field beside the text says what would be lost: media, flags, or a part of the prompt."""
    if field := next((field for field in _MEDIA_FIELDS if fields.get(field)), None):
        raise RowError(f"field '{field}' has media, and only text is trained on; remove the row, or the field")
    # Plain text with a label is a row for a classifier.
    unwanted = () if row_format == "text" else _WANTED_FIELDS
    if field := next((field for field in unwanted if fields.get(field) is False), None):
        raise RowError(f"field '{field}' is false, so its completion is an unwanted one; remove the row, or the field")
    if field := next((field for field in _ROW_FLAGS if _changes_weight(field, fields.get(field))), None):
        raise RowError(
            f"field '{field}' is {fields[field]}, and rows have no weights of their own; remove the row, or the field, "
            "or move rows of one weight into a source of spec.dataset.sources"
        )
    if _has_content(fields.get(_TEMPLATE_ARGUMENTS)):
        raise RowError(
            f"field '{_TEMPLATE_ARGUMENTS}' is not passed to the chat template; remove it, or set "
            "spec.dataset.chatTemplate to a template that needs none"
        )
    context = _CONTEXT_FIELDS.get(row_format, ())
    if field := next((field for field in context if _has_content(fields.get(field))), None):
        raise RowError(
            f"field '{field}' has no place in {row_format} rows; write messages, or set spec.dataset.template"
        )


def _changes_weight(field: str, value: Any) -> bool:
    """Return whether a flag says anything but that a row is learned as any other; a loss may also be a measurement."""
    if value is None or isinstance(value, bool) or field != "weight":
        return value is False
    try:
        return float(value) != 1
    except (TypeError, ValueError, OverflowError):  # the weight of a thing, in words
        return False


def _has_content(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value.strip()) and value.strip() not in _EMPTY_JSON
    return has_text(without_nulls(value))
