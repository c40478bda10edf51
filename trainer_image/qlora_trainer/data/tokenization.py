"""Rows to token rows: one pass of special tokens, and which tokens are learned, up to the end token."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from qlora_trainer.data.rows import Example, Text

Span: TypeAlias = tuple[int, int]
"""A half-open range of positions."""


@dataclass(frozen=True)
class TokenRow:
    """One row as tokens, and which of them are learned."""

    input_ids: tuple[int, ...]
    label_spans: tuple[Span, ...]
    """Positions of the tokens that are learned, in order; never 0, since nothing predicts a row's first token."""
    prompt_ids: tuple[int, ...] = ()
    """What a model is asked for the answer: for held-out rows only, as are the two texts; plain text has none."""
    prompt: str = ""
    reference: str = ""

    @property
    def label_count(self) -> int:
        """Return how many tokens are learned."""
        return sum(end - start for start, end in self.label_spans)

    def truncate(self, length: int) -> "TokenRow":
        """Return the row without what lies beyond a length."""
        if len(self.input_ids) <= length:
            return self
        learned = tuple((start, min(end, length)) for start, end in self.label_spans if start < length)
        return replace(self, input_ids=self.input_ids[:length], label_spans=learned)


def encode_examples(examples: Sequence[Example], tokenizer: Any, loss: str) -> list[TokenRow]:
    """Turn prompts and answers into token rows; the answer and the end token are learned."""
    prompts = prompt_ids([example.prompt for example in examples], tokenizer)
    texts = prompt_ids([example.prompt + example.answer for example in examples], tokenizer)
    rows = []
    for example, prompt, text in zip(examples, prompts, texts, strict=True):
        # Where a token spans the seam, prompt and whole differ before the prompt ends; that token is the answer's.
        first = 1 if loss == "all" else max(common_prefix_length(prompt, text), 1)
        ids = (*text, tokenizer.eos_token_id)
        rows.append(TokenRow(ids, ((first, len(ids)),), tuple(prompt), example.prompt, example.answer))
    return rows


def encode_texts(texts: Sequence[Text], tokenizer: Any) -> list[TokenRow]:
    """Turn plain texts into token rows; all of it is learned, and the end token."""
    encoded = prompt_ids([text.text for text in texts], tokenizer)
    return [TokenRow((*ids, tokenizer.eos_token_id), ((1, len(ids) + 1),)) for ids in encoded]


def prompt_ids(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Return the tokens of texts with the tokenizer's own start token, once, and without an end token."""
    encoded: list[list[int]] = tokenizer(list(texts), add_special_tokens=True)["input_ids"]
    return [_without_end(_single_start(ids, tokenizer), tokenizer) for ids in encoded]


def _single_start(ids: list[int], tokenizer: Any) -> list[int]:
    start = tokenizer.bos_token_id
    return ids[1:] if start is not None and ids[:2] == [start, start] else ids


def _without_end(ids: list[int], tokenizer: Any) -> list[int]:
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def common_prefix_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens two rows share from their start."""
    for position, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return position
    return min(len(one), len(other))
