"""A model on held-out rows: the loss of each row's supervised tokens, and how many it would have chosen."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch

from qlora_api.names import Reason
from qlora_api.report import EvaluatedRow
from qlora_api.v1alpha1 import EvaluationSpec, Metrics
from qlora_trainer.data.batching import make_batch, micro_batches
from qlora_trainer.data.tokenization import TokenRow
from qlora_trainer.distributed.world import World
from qlora_trainer.errors import RunError
from qlora_trainer.evaluation.generation import answer_rows, choose_asked, longest_answer
from qlora_trainer.evaluation.lm_eval_tasks import Battery, Figures
from qlora_trainer.evaluation.scoring import perplexity, score
from qlora_trainer.model.base_model import Tuned


@dataclass(frozen=True)
class RowSum:
    """A model on one row."""

    tokens: int
    """Supervised tokens."""
    loss: float
    """Their summed cross-entropy, in nats."""
    correct: int
    """Those that are the model's first choice."""


LEARNED_WRONG: Final = "lower spec.training.learningRate, or check the dataset"
BROKEN_BASE: Final = (
    "nothing is trained yet, so spec.model.uri has weights that are no numbers, or too large ones for the dtype in use"
)


@dataclass(frozen=True)
class Examination:
    """A model on all held-out rows, and on public benchmarks; an answer is None where none was asked for."""

    sums: tuple[RowSum, ...]
    answers: tuple[str | None, ...]
    figures: Figures


def evaluate(tuned: Tuned, rows: Sequence[TokenRow], micro_batch: int, *, packing: bool) -> Metrics:
    """Return the quality on rows; every mean is over supervised tokens, so batches do not matter."""
    sums = sum_rows(tuned, rows, micro_batch, packing=packing)
    tokens = sum(row.tokens for row in sums)
    loss = math.fsum(row.loss for row in sums) / tokens
    return Metrics(loss=loss, perplexity=perplexity(loss), token_accuracy=sum(row.correct for row in sums) / tokens)


def sum_rows(
    tuned: Tuned, rows: Sequence[TokenRow], micro_batch: int, *, packing: bool, remedy: str = LEARNED_WRONG
) -> tuple[RowSum, ...]:
    """Return each row's sums, in the order of the rows; the remedy is for sums that are no numbers."""
    groups = micro_batches(rows, micro_batch, packing=packing)
    sums = tuple(found for group in groups for found in _sum_group(tuned, group, packing=packing))
    if not math.isfinite(total := math.fsum(row.loss for row in sums)):
        raise RunError(Reason.NON_FINITE_LOSS, f"the loss on the held-out rows is {total}; {remedy}")
    return sums


def _sum_group(tuned: Tuned, rows: Sequence[TokenRow], *, packing: bool) -> Iterator[RowSum]:
    losses, hits = tuned.statistics(make_batch(rows, tuned.device, packing=packing))
    counts = [row.label_count for row in rows]
    for count, loss, hit in zip(counts, torch.split(losses, counts), torch.split(hits, counts), strict=True):
        yield RowSum(count, float(loss.sum()), int(hit.sum()))


@dataclass(frozen=True)
class Examiner:
    """The same questions for every model."""

    rows: Sequence[TokenRow]
    tokenizer: Any
    spec: EvaluationSpec
    micro_batch: int
    packing: bool
    world: World
    battery: Battery | None = None
    """Public benchmarks, where the spec asks for any."""

    def examine(self, tuned: Tuned, *, adapter: bool = True) -> Examination:
        """Measure the adapter, or the base below it, on every row, and let it answer some."""
        with tuned.evaluating(adapter=adapter):
            remedy = LEARNED_WRONG if adapter else BROKEN_BASE
            count = partial(sum_rows, tuned, micro_batch=self.micro_batch, packing=self.packing, remedy=remedy)
            sums = self.world.spread(self.rows, count)
            return Examination(sums, self._ask(tuned), self.battery.examine(tuned) if self.battery else {})

    def _ask(self, tuned: Tuned) -> tuple[str | None, ...]:
        places = choose_asked(self.rows, self.spec.generations)
        asked = [self.rows[place] for place in places]
        # Of all rows, so that an answer does not depend on which process is asked.
        limit = longest_answer(asked, self.spec.max_answer_tokens)
        ask = partial(answer_rows, tuned, tokenizer=self.tokenizer, batch=self.micro_batch, limit=limit)
        texts = self.world.spread(asked, ask)
        said = dict(zip(places, texts, strict=True))
        return tuple(said.get(place) for place in range(len(self.rows)))


def compare(rows: Sequence[TokenRow], base: Examination, adapter: Examination) -> tuple[EvaluatedRow, ...]:
    """Return base and adapter side by side, row by row."""
    return tuple(
        EvaluatedRow(
            tokens=row.label_count,
            prompt=row.prompt,
            reference=row.reference,
            base=score(before.loss, before.correct, row.reference, base.answers[place]),
            adapter=score(after.loss, after.correct, row.reference, adapter.answers[place]),
        )
        for place, (row, before, after) in enumerate(zip(rows, base.sums, adapter.sums, strict=True))
    )
