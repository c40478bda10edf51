"""Batched generation of answers, greedy by default; each ends at the model's own stop tokens."""

import math
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any, Final, NamedTuple

import torch
from transformers import GenerationConfig

from qlora_trainer.data.chat_template import end_of_turn_token
from qlora_trainer.data.tokenization import TokenRow, decode_answers
from qlora_trainer.model.base_model import TrainableModel
from qlora_trainer.model.generation_config import simple_settings

_LENGTH_FACTOR: Final = 1.5
"""Limit of an answer relative to the longest reference; above 1, so that a model that does not stop is noticed."""


_GREEDY: Final[Mapping[str, Any]] = {"do_sample": False}


class Answer(NamedTuple):
    """A generated answer."""

    text: str
    complete: bool
    """Whether it ended with a stop token and not at the limit."""


def prompt_row_indices(rows: Sequence[TokenRow], count: int) -> list[int]:
    """Return the indices of the first `count` rows with a prompt and a reference."""
    return [index for index, row in enumerate(rows) if row.prompt_ids and row.reference][:count]


def generate_answers(
    trainable: TrainableModel, rows: Sequence[TokenRow], tokenizer: Any, *, batch_size: int, max_new_tokens: int
) -> tuple[str, ...]:
    """Return the answers to the prompts of the rows, each at most `max_new_tokens` tokens long."""
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
    """Generate answers for one batch of prompts; `sampling` is passed to GenerationConfig."""
    # Left padding, so that every answer starts right after its prompt.
    width = max(len(prompt) for prompt in prompts)
    stops = stop_tokens(trainable.model, tokenizer)
    ids = torch.tensor([[stops[0]] * (width - len(prompt)) + [*prompt] for prompt in prompts], device=trainable.device)
    mask = torch.tensor(
        [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=trainable.device
    )
    settings = GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=stops, pad_token_id=stops[0], **sampling)
    with trainable.autocast(), simple_settings(trainable.model):
        generated = trainable.model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
    answers = generated[:, width:].tolist()
    texts = decode_answers(tokenizer, [until_stop(answer, stops) for answer in answers])
    complete = [any(token in stops for token in answer) for answer in answers]
    return [Answer(*pair) for pair in zip(texts, complete, strict=True)]


def until_stop(tokens: Sequence[int], stops: Sequence[int]) -> list[int]:
    """Return the tokens before the first stop token; not every tokenizer has it among its special tokens."""
    return list(takewhile(lambda token: token not in stops, tokens))


def stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Return the stop tokens: the tokenizer's EOS first, then those of the generation config and the chat template's.

    Chat models are trained to end with the template's token, which may be missing in the others, as Phi-3's <|end|> is.
    """
    own = getattr(model.generation_config, "eos_token_id", None)
    named = own if isinstance(own, list) else [own]
    ends = (tokenizer.eos_token_id, *named, end_of_turn_token(tokenizer))
    return list(dict.fromkeys(token for token in ends if token is not None))


def choose_max_new_tokens(rows: Sequence[TokenRow], limit: int) -> int:
    """Return the maximum length of an answer: relative to the longest reference, at most `limit`."""
    reference = max((len(row.input_ids) - len(row.prompt_ids) for row in rows), default=0)
    return min(max(math.ceil(reference * _LENGTH_FACTOR), 1), limit)
