"""A few rows as the model sees them, and which of their tokens are learned: a wrong template shows at a glance."""

from collections.abc import Iterator
from typing import Any, Final

from qlora_api.report import TextSpan
from qlora_trainer.data.tokenization import Span, TokenRow

SHOWN_ROWS: Final = 3
_SHOWN_CHARACTERS: Final = 2000
"""Of one piece: more says no more about a template."""
LEARNED_OPEN, LEARNED_CLOSE = "⟦", "⟧"
"""Around what is learned, where there are no colours."""


def shown_rows(count: int) -> tuple[int, ...]:
    """Return the numbers of the rows that are shown: spread over all of them, and so over the sources."""
    shown = min(SHOWN_ROWS, count)
    return tuple(count * place // shown for place in range(shown))


def preview(row: TokenRow, tokenizer: Any) -> tuple[TextSpan, ...]:
    """Return a row in pieces that are learned and pieces that are not, special tokens too."""
    return tuple(
        TextSpan(text=_shortened(tokenizer.decode(list(row.input_ids[start:end]))), learned=learned)
        for (start, end), learned in _pieces(row)
    )


def _pieces(row: TokenRow) -> Iterator[tuple[Span, bool]]:
    place = 0
    for start, end in row.label_spans:
        if place < start:
            yield (place, start), False
        yield (start, end), True
        place = end
    if place < len(row.input_ids):
        yield (place, len(row.input_ids)), False


def _shortened(text: str) -> str:
    half = _SHOWN_CHARACTERS // 2
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:half]} … {text[-half:]}"


def format_preview(pieces: tuple[TextSpan, ...]) -> str:
    """Return a preview as text with marks."""
    return "".join(f"{LEARNED_OPEN}{piece.text}{LEARNED_CLOSE}" if piece.learned else piece.text for piece in pieces)
