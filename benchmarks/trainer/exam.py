"""The same evaluation for all contenders: the mean loss on the answers of held-out rows."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch.nn import functional

from benchmarks.trainer.task import Task, held_out_pairs

_BATCH: Final = 16


def make_evaluation(task: Task, model: Any, tokenizer: Any) -> Callable[[], float] | None:
    """Return a function that evaluates the model, or None if there are no held-out rows."""
    rows = [_tokens(pair.prompt, pair.answer, tokenizer) for pair in held_out_pairs(task)]
    return (lambda: _mean_loss(model, rows)) if rows else None


def _tokens(prompt: str, answer: str, tokenizer: Any) -> tuple[list[int], int]:
    ids = [*tokenizer(prompt + answer)["input_ids"], tokenizer.eos_token_id]
    return ids, len(tokenizer(prompt)["input_ids"])


@torch.no_grad()
def _mean_loss(model: Any, rows: list[tuple[list[int], int]]) -> float:
    total, count = 0.0, 0
    with _without_dropout(model), torch.autocast(model.device.type, torch.bfloat16):
        for start in range(0, len(rows), _BATCH):
            loss, labels = _loss_sum(model, rows[start : start + _BATCH])
            total, count = total + loss, count + labels
    return total / count


def _loss_sum(model: Any, rows: list[tuple[list[int], int]]) -> tuple[float, int]:
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows], device=model.device)
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows], device=model.device)
    labels = torch.tensor(
        [[-100] * first + ids[first:] + [-100] * (width - len(ids)) for ids, first in rows], device=model.device
    )
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    targets = labels[:, 1:]
    losses = functional.cross_entropy(logits[targets != -100].float(), targets[targets != -100], reduction="sum")
    return float(losses), int((targets != -100).sum())


@contextmanager
def _without_dropout(model: Any) -> Iterator[None]:
    """Disable dropout and nothing else.

    In eval mode bitsandbytes repacks 4-bit weights on a CPU, and every later gradient is wrong.
    """
    was_training = model.training
    model.train()
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    # Dropout draws random numbers; the evaluation must not advance the random state of the training.
    with torch.random.fork_rng():
        for layer in layers:
            layer.eval()
        try:
            yield
        finally:
            for layer in layers:
                layer.train()
            model.train(was_training)
