"""Whether a validation set is large enough for its figures to be called better or worse."""

from typing import Final

MIN_ROWS: Final = 30
"""Held-out rows: percentile bootstrap intervals of fewer are too narrow (Hesterberg 2015, section 4.2)."""
MIN_TOKENS: Final = 200
"""Answer tokens: with fewer, two standard errors of a token accuracy near a half are above 7 points."""


def describe_small_validation(rows: int, tokens: int) -> str:
    """Return why nothing follows from the figures of a small validation set; empty if it is large enough."""
    if rows >= MIN_ROWS and tokens >= MIN_TOKENS:
        return ""
    return (
        f"{rows:,} held-out row{'s' if rows != 1 else ''} with {tokens:,} answer tokens are too few to tell whether "
        f"the adapter is better or worse than its base; that takes {MIN_ROWS} rows and {MIN_TOKENS} tokens"
    )
