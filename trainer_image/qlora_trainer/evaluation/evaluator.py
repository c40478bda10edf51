"""Evaluates a model on the validation set: loss and token accuracy over labels, generated answers, benchmarks."""

import math
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, replace
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
    """Sums over one row."""

    tokens: int
    """Number of labels."""
    loss: float
    """Summed cross-entropy over the labels, in nats."""
    correct: int
    """Labels that are the model's top-1 prediction."""


DIVERGED_HINT: Final = "lower spec.training.learningRate, or check the dataset"
BROKEN_BASE_HINT: Final = (
    "nothing is trained yet, so the weights of spec.model.uri contain NaN, or overflow in the dtype in use"
)


@dataclass(frozen=True)
class EvaluationResult:
    """Statistics of all validation rows, and benchmark metrics; an answer is None if none was generated for the row."""

    row_statistics: tuple[RowStatistics, ...]
    answers: tuple[str | None, ...]
    task_metrics: TaskMetrics


def compute_metrics(
    trainable: TrainableModel, rows: Sequence[TokenRow], micro_batch_size: int, *, packing: bool
) -> Metrics:
    """Return metrics averaged over labels, so that they do not depend on the batch size."""
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
    """Return each row's sums, in order; raises NON_FINITE_LOSS with `hint` if the loss is not finite."""
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
    """Runs the same evaluation for base and adapter."""

    rows: Sequence[TokenRow]
    tokenizer: Any
    spec: EvaluationSpec
    micro_batch_size: int
    packing: bool
    world: World
    benchmark_suite: BenchmarkSuite | None = None
    """Public benchmarks; None if the spec names none."""

    def evaluate(
        self,
        trainable: TrainableModel,
        *,
        adapter: bool = True,
        earlier: EvaluationResult | None = None,
        on_part: Callable[[EvaluationResult], None] = lambda _: None,
    ) -> EvaluationResult:
        """Evaluate the adapter, or the base with the adapter disabled.

        Args:
            trainable: The model.
            adapter: Whether the adapter is enabled.
            earlier: What is evaluated already, possibly without some benchmarks.
            on_part: Called with everything so far after each part.

        """
        with trainable.evaluating(adapter=adapter):
            result = earlier
            if result is None:
                hint = DIVERGED_HINT if adapter else BROKEN_BASE_HINT
                result = EvaluationResult(
                    self._compute_statistics(trainable, hint), self._generate_answers(trainable), {}
                )
                on_part(result)
            for metrics in self._run_benchmarks(trainable, {task for task, _ in result.task_metrics}):
                result = replace(result, task_metrics={**result.task_metrics, **metrics})
                on_part(result)
            return result

    def _compute_statistics(self, trainable: TrainableModel, hint: str) -> tuple[RowStatistics, ...]:
        statistics = partial(
            compute_row_statistics,
            trainable,
            micro_batch_size=self.micro_batch_size,
            packing=self.packing,
            hint=hint,
        )
        return self.world.map_sharded(self.rows, statistics)

    def _run_benchmarks(self, trainable: TrainableModel, finished: Container[str]) -> Iterator[TaskMetrics]:
        """Yield the metrics of each task that is not finished; all processes compute all, as tasks differ in size."""
        if self.benchmark_suite is None:
            return
        for name in self.benchmark_suite.names:
            if name not in finished:
                yield self.benchmark_suite.run(trainable, name)

    def _generate_answers(self, trainable: TrainableModel) -> tuple[str | None, ...]:
        indices = prompt_row_indices(self.rows, self.spec.generations)
        prompt_rows = [self.rows[index] for index in indices]
        # Computed over all rows, so that an answer does not depend on the rank that generates it.
        limit = choose_max_new_tokens(prompt_rows, self.spec.max_answer_tokens)
        generate = partial(
            generate_answers,
            trainable,
            tokenizer=self.tokenizer,
            batch_size=self.micro_batch_size,
            max_new_tokens=limit,
        )
        answers = dict(zip(indices, self.world.map_sharded(prompt_rows, generate), strict=True))
        return tuple(answers.get(index) for index in range(len(self.rows)))


def compare_rows(
    rows: Sequence[TokenRow], base: EvaluationResult, adapter: EvaluationResult
) -> tuple[EvaluatedRow, ...]:
    """Return the scores of base and adapter for each row."""
    return tuple(
        EvaluatedRow(
            tokens=row.label_count,
            prompt=row.prompt,
            reference=row.reference,
            base=score(before.loss, before.correct, row.reference, base.answers[index]),
            adapter=score(after.loss, after.correct, row.reference, adapter.answers[index]),
        )
        for index, (row, before, after) in enumerate(
            zip(rows, base.row_statistics, adapter.row_statistics, strict=True)
        )
    )
