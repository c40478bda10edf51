"""Base model and adapter on the same held-out rows: in numbers, and in answers side by side."""

import math
from collections.abc import Sequence
from typing import Any, Final

import torch
from transformers import GenerationConfig

from qlora_api.names import Reason
from qlora_api.report import Sample
from qlora_api.v1alpha1 import Metrics
from qlora_trainer.batches import make_batch, micro_batches
from qlora_trainer.errors import RunError
from qlora_trainer.model import Tuned
from qlora_trainer.tokens import TokenRow

MAX_NEW_TOKENS: Final = 128
"""Longest answer of a sample: enough to see style and content, and a CPU makes only a few tokens a second."""
_ROOM: Final = 1.5
"""Answers may be this much longer than the longest reference, so that one that does not stop is seen."""


def evaluate(tuned: Tuned, rows: Sequence[TokenRow], micro_batch: int, *, packing: bool) -> Metrics:
    """Return the quality on rows; every mean is over supervised tokens, so batches do not matter."""
    total, correct, labels = 0.0, 0, 0
    for group in micro_batches(rows, micro_batch, packing=packing):
        batch = make_batch(group, tuned.device, packing=packing)
        batch_loss, batch_correct = tuned.statistics(batch)
        total, correct, labels = total + batch_loss, correct + batch_correct, labels + len(batch.labels)
    mean = total / labels
    if not math.isfinite(mean):
        raise RunError(
            Reason.NON_FINITE_LOSS,
            f"the loss on the held-out rows is {mean}; lower spec.training.learningRate, or check the dataset",
        )
    return Metrics(loss=mean, perplexity=math.exp(min(mean, 700.0)), token_accuracy=correct / labels)


def answer(tuned: Tuned, rows: Sequence[TokenRow], tokenizer: Any) -> tuple[str, ...]:
    """Return the model's greedy answers to the prompts of rows."""
    prompts = [list(row.prompt_ids) for row in rows]
    width = max(len(prompt) for prompt in prompts)
    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = torch.tensor([[filler] * (width - len(prompt)) + prompt for prompt in prompts], device=tuned.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=tuned.device)
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=longest_answer(rows),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=filler,
    )
    with tuned.autocast():
        made = tuned.causal.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
    return tuple(tokenizer.batch_decode(made[:, width:], skip_special_tokens=True))


def longest_answer(rows: Sequence[TokenRow]) -> int:
    """Return how many tokens an answer may have."""
    reference = max(len(row.input_ids) - len(row.prompt_ids) for row in rows)
    return min(math.ceil(reference * _ROOM), MAX_NEW_TOKENS)


def generate_samples(tuned: Tuned, rows: Sequence[TokenRow], tokenizer: Any, count: int) -> tuple[Sample, ...]:
    """Let base model and adapter answer the first held-out prompts."""
    asked = rows[:count]
    if not asked:
        return ()
    with tuned.evaluating(adapter=False):
        before = answer(tuned, asked, tokenizer)
    with tuned.evaluating():
        after = answer(tuned, asked, tokenizer)
    return tuple(
        Sample(prompt=row.prompt, reference=row.reference, base=base, adapter=adapter)
        for row, base, adapter in zip(asked, before, after, strict=True)
    )
