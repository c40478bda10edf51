"""A model's own words: greedy answers to held-out prompts, in batches, each ended where its model ends it."""

import math
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any, Final, NamedTuple

import torch
from transformers import GenerationConfig

from qlora_trainer.data.chat_template import end_of_turn_token
from qlora_trainer.data.tokenization import TokenRow
from qlora_trainer.model.base_model import TrainableModel

_LENGTH_FACTOR: Final = 1.5
"""Answers may be this much longer than the longest reference, so that one that does not stop is seen."""


_GREEDY: Final[Mapping[str, Any]] = {"do_sample": False}


class Answer(NamedTuple):
    """What a model says to a prompt."""

    text: str
    complete: bool
    """It came to its end by itself, and not to the limit."""


def prompt_row_indices(rows: Sequence[TokenRow], count: int) -> list[int]:
    """Return the places of the first rows that have both a prompt to ask and a reference to compare with."""
    return [place for place, row in enumerate(rows) if row.prompt_ids and row.reference][:count]


def generate_answers(
    trainable: TrainableModel, rows: Sequence[TokenRow], tokenizer: Any, *, batch_size: int, max_new_tokens: int
) -> tuple[str, ...]:
    """Return the answers to the prompts of rows, each at most `max_new_tokens` tokens long."""
    groups = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    prompts = [[row.prompt_ids for row in group] for group in groups]
    return tuple(
        answer.text for group in prompts for answer in generate_batch(trainable, group, tokenizer, max_new_tokens)
    )


def generate_batch(
    trainable: TrainableModel,
    prompts: Sequence[Sequence[int]],
    tokenizer: Any,
    max_new_tokens: int,
    sampling: Mapping[str, Any] = _GREEDY,
) -> list[Answer]:
    """Return the answers to prompts, all of one batch; choice is how transformers chooses among the next tokens."""
    # Padding is on the left, so that every answer starts where its prompt ends.
    width = max(len(prompt) for prompt in prompts)
    stops = stop_tokens(trainable.model, tokenizer)
    ids = torch.tensor([[stops[0]] * (width - len(prompt)) + [*prompt] for prompt in prompts], device=trainable.device)
    mask = torch.tensor(
        [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=trainable.device
    )
    settings = GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=stops, pad_token_id=stops[0], **sampling)
    with trainable.autocast():
        made = trainable.model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
    answers = made[:, width:].tolist()
    texts = tokenizer.batch_decode([until_stop(answer, stops) for answer in answers], skip_special_tokens=True)
    ended = [any(token in stops for token in answer) for answer in answers]
    return [Answer(*pair) for pair in zip(texts, ended, strict=True)]


def until_stop(tokens: Sequence[int], stops: Sequence[int]) -> list[int]:
    """Return what comes before the first token that ends an answer; not every tokenizer knows it as special."""
    return list(takewhile(lambda token: token not in stops, tokens))


def stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Return what ends an answer: the tokenizer's end token first, those that the model itself names, the template's.

    A chat is taught to end with its template's token, which need not be among the others: Phi-3's <|end|> is not.
    """
    own = getattr(model.generation_config, "eos_token_id", None)
    named = own if isinstance(own, list) else [own]
    ends = (tokenizer.eos_token_id, *named, end_of_turn_token(tokenizer))
    return list(dict.fromkeys(token for token in ends if token is not None))


def choose_max_new_tokens(rows: Sequence[TokenRow], limit: int) -> int:
    """Return how many tokens an answer may have."""
    reference = max((len(row.input_ids) - len(row.prompt_ids) for row in rows), default=0)
    return min(max(math.ceil(reference * _LENGTH_FACTOR), 1), limit)
