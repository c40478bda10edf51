"""Preview of a few rows as the model sees them, with the labels marked, so that a wrong template is obvious."""

from collections.abc import Iterator
from typing import Any, Final

from qlora_api.report import TextSpan
from qlora_trainer.data.tokenization import Span, TokenRow, decode

SHOWN_ROWS: Final = 3
_SHOWN_CHARACTERS: Final = 2000
"""Maximum length of one span; more text says nothing new about a template."""
LEARNED_OPEN, LEARNED_CLOSE = "⟦", "⟧"
"""Markers around labels in plain text."""


def shown_rows(count: int) -> tuple[int, ...]:
    """Return the indices of the rows to show, spread evenly over the dataset and so over its sources."""
    shown = min(SHOWN_ROWS, count)
    return tuple(count * index // shown for index in range(shown))


def preview(row: TokenRow, tokenizer: Any) -> tuple[TextSpan, ...]:
    """Return a row as alternating spans with and without labels; special tokens are shown."""
    return tuple(
        TextSpan(text=_shortened(decode(tokenizer, row.input_ids[start:end])), learned=learned)
        for (start, end), learned in _split_by_label(row)
    )


def _split_by_label(row: TokenRow) -> Iterator[tuple[Span, bool]]:
    position = 0
    for start, end in row.label_spans:
        if position < start:
            yield (position, start), False
        yield (start, end), True
        position = end
    if position < len(row.input_ids):
        yield (position, len(row.input_ids)), False


def _shortened(text: str) -> str:
    half = _SHOWN_CHARACTERS // 2
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:half]} … {text[-half:]}"


def format_preview(pieces: tuple[TextSpan, ...]) -> str:
    """Return a preview as plain text, with labels between ⟦ and ⟧."""
    return "".join(f"{LEARNED_OPEN}{piece.text}{LEARNED_CLOSE}" if piece.learned else piece.text for piece in pieces)
