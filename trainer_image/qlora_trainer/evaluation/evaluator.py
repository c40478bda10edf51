"""A model on held-out rows: the loss of each row's supervised tokens, and how many it would have chosen."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch

from qlora_api.reasons import Reason
from qlora_api.report import EvaluatedRow
from qlora_api.v1alpha1 import EvaluationSpec, Metrics
from qlora_trainer.data.batching import collate, split_micro_batches
from qlora_trainer.data.tokenization import TokenRow
from qlora_trainer.distributed.world import World
from qlora_trainer.errors import RunError
from qlora_trainer.evaluation.generation import choose_max_new_tokens, generate_answers, prompt_row_indices
from qlora_trainer.evaluation.lm_eval_tasks import BenchmarkSuite, TaskMetrics
from qlora_trainer.evaluation.scoring import perplexity, score
from qlora_trainer.model.base_model import TrainableModel


@dataclass(frozen=True)
class RowStatistics:
    """A model on one row."""

    tokens: int
    """Supervised tokens."""
    loss: float
    """Their summed cross-entropy, in nats."""
    correct: int
    """Those that are the model's first choice."""


DIVERGED_HINT: Final = "lower spec.training.learningRate, or check the dataset"
BROKEN_BASE_HINT: Final = (
    "nothing is trained yet, so spec.model.uri has weights that are no numbers, or too large ones for the dtype in use"
)


@dataclass(frozen=True)
class EvaluationResult:
    """A model on all held-out rows, and on public benchmarks; an answer is None where none was asked for."""

    row_statistics: tuple[RowStatistics, ...]
    answers: tuple[str | None, ...]
    task_metrics: TaskMetrics


def compute_metrics(
    trainable: TrainableModel, rows: Sequence[TokenRow], micro_batch_size: int, *, packing: bool
) -> Metrics:
    """Return the quality on rows; every mean is over supervised tokens, so batches do not matter."""
    sums = compute_row_statistics(trainable, rows, micro_batch_size, packing=packing)
    tokens = sum(row.tokens for row in sums)
    loss = math.fsum(row.loss for row in sums) / tokens
    return Metrics(loss=loss, perplexity=perplexity(loss), token_accuracy=sum(row.correct for row in sums) / tokens)


def compute_row_statistics(
    trainable: TrainableModel,
    rows: Sequence[TokenRow],
    micro_batch_size: int,
    *,
    packing: bool,
    hint: str = DIVERGED_HINT,
) -> tuple[RowStatistics, ...]:
    """Return each row's sums, in the order of the rows; the remedy is for sums that are no numbers."""
    groups = split_micro_batches(rows, micro_batch_size, packing=packing)
    sums = tuple(found for group in groups for found in _batch_statistics(trainable, group, packing=packing))
    if not math.isfinite(total := math.fsum(row.loss for row in sums)):
        raise RunError(Reason.NON_FINITE_LOSS, f"the loss on the held-out rows is {total}; {hint}")
    return sums


def _batch_statistics(trainable: TrainableModel, rows: Sequence[TokenRow], *, packing: bool) -> Iterator[RowStatistics]:
    losses, hits = trainable.statistics(collate(rows, trainable.device, packing=packing))
    counts = [row.label_count for row in rows]
    for count, loss, hit in zip(counts, torch.split(losses, counts), torch.split(hits, counts), strict=True):
        yield RowStatistics(count, float(loss.sum()), int(hit.sum()))


@dataclass(frozen=True)
class Evaluator:
    """The same questions for every model."""

    rows: Sequence[TokenRow]
    tokenizer: Any
    spec: EvaluationSpec
    micro_batch_size: int
    packing: bool
    world: World
    benchmark_suite: BenchmarkSuite | None = None
    """Public benchmarks, where the spec asks for any."""

    def evaluate(self, trainable: TrainableModel, *, adapter: bool = True) -> EvaluationResult:
        """Measure the adapter, or the base below it, on every row, and let it answer some."""
        with trainable.evaluating(adapter=adapter):
            hint = DIVERGED_HINT if adapter else BROKEN_BASE_HINT
            count = partial(
                compute_row_statistics,
                trainable,
                micro_batch_size=self.micro_batch_size,
                packing=self.packing,
                hint=hint,
            )
            sums = self.world.map_sharded(self.rows, count)
            return EvaluationResult(
                sums,
                self._generate_answers(trainable),
                self.benchmark_suite.run(trainable) if self.benchmark_suite else {},
            )

    def _generate_answers(self, trainable: TrainableModel) -> tuple[str | None, ...]:
        places = prompt_row_indices(self.rows, self.spec.generations)
        asked = [self.rows[place] for place in places]
        # Of all rows, so that an answer does not depend on which process is asked.
        limit = choose_max_new_tokens(asked, self.spec.max_answer_tokens)
        ask = partial(
            generate_answers,
            trainable,
            tokenizer=self.tokenizer,
            batch_size=self.micro_batch_size,
            max_new_tokens=limit,
        )
        texts = self.world.map_sharded(asked, ask)
        said = dict(zip(places, texts, strict=True))
        return tuple(said.get(place) for place in range(len(self.rows)))


def compare_rows(
    rows: Sequence[TokenRow], base: EvaluationResult, adapter: EvaluationResult
) -> tuple[EvaluatedRow, ...]:
    """Return base and adapter side by side, row by row."""
    return tuple(
        EvaluatedRow(
            tokens=row.label_count,
            prompt=row.prompt,
            reference=row.reference,
            base=score(before.loss, before.correct, row.reference, base.answers[place]),
            adapter=score(after.loss, after.correct, row.reference, adapter.answers[place]),
        )
        for place, (row, before, after) in enumerate(
            zip(rows, base.row_statistics, adapter.row_statistics, strict=True)
        )
    )
