"""Examples to token rows: one pass of special tokens, the answer labelled up to its end, cut at the maximum."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, TypeAlias

from qlora_trainer.rows import Example

_BATCH: Final = 1000
"""Rows per call of the tokenizer; more saves no time, and fewer keep less in memory."""


Span: TypeAlias = tuple[int, int]
"""A half-open range of positions."""


@dataclass(frozen=True)
class TokenRow:
    """One example as tokens, and which of them are learned."""

    input_ids: tuple[int, ...]
    learned: tuple[Span, ...]
    """Positions of the tokens that are learned, in order; never 0, since nothing predicts a row's first token."""
    prompt_ids: tuple[int, ...] = ()
    """What a model is asked for the answer: for held-out rows only, as are the two texts."""
    prompt: str = ""
    reference: str = ""

    @property
    def label_count(self) -> int:
        """Return how many tokens are learned."""
        return sum(end - start for start, end in self.learned)

    def cut(self, length: int) -> "TokenRow":
        """Return the row without what lies beyond a length."""
        learned = tuple((start, min(end, length)) for start, end in self.learned if start < length)
        return replace(self, input_ids=self.input_ids[:length], learned=learned)


@dataclass(frozen=True)
class Tokenised:
    """The rows that can be learned from, and what happened to the others."""

    rows: tuple[TokenRow, ...]
    truncated: int
    """Rows cut at the maximum."""
    dropped: int
    """Of those, rows whose prompt alone fills the maximum: nothing of the answer is left."""
    longest: int
    """Tokens of the longest row before any cut."""

    @property
    def tokens(self) -> int:
        """Return the tokens of all rows."""
        return sum(len(row.input_ids) for row in self.rows)


def tokenise(examples: Sequence[Example], tokenizer: Any, max_length: int, loss: str) -> Tokenised:
    """Turn examples into token rows."""
    full = list(_token_rows(examples, tokenizer, loss))
    kept = tuple(row for row in (row.cut(max_length) for row in full) if row.label_count > 0)
    return Tokenised(
        rows=kept,
        truncated=sum(len(row.input_ids) > max_length for row in full),
        dropped=len(full) - len(kept),
        longest=max((len(row.input_ids) for row in full), default=0),
    )


def _token_rows(examples: Sequence[Example], tokenizer: Any, loss: str) -> Iterator[TokenRow]:
    for start in range(0, len(examples), _BATCH):
        batch = examples[start : start + _BATCH]
        prompts = prompt_ids([example.prompt for example in batch], tokenizer)
        texts = prompt_ids([example.prompt + example.answer for example in batch], tokenizer)
        for example, prompt, text in zip(batch, prompts, texts, strict=True):
            # Where a token spans the seam, prompt and whole differ before the prompt ends; that token is the answer's.
            first = 1 if loss == "all" else max(common_prefix_length(prompt, text), 1)
            ids = tuple(_with_end(text, tokenizer))
            yield TokenRow(ids, ((first, len(ids)),), tuple(prompt), example.prompt, example.answer)


def prompt_ids(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Return the tokens of texts with the tokenizer's own start token, once, and without an end token."""
    encoded: list[list[int]] = tokenizer(list(texts), add_special_tokens=True)["input_ids"]
    return [_without_end(_single_start(ids, tokenizer), tokenizer) for ids in encoded]


def _single_start(ids: list[int], tokenizer: Any) -> list[int]:
    start = tokenizer.bos_token_id
    return ids[1:] if start is not None and ids[:2] == [start, start] else ids


def _without_end(ids: list[int], tokenizer: Any) -> list[int]:
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def _with_end(ids: list[int], tokenizer: Any) -> list[int]:
    return [*ids, tokenizer.eos_token_id]


def common_prefix_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens two rows share from their start."""
    for position, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return position
    return min(len(one), len(other))
