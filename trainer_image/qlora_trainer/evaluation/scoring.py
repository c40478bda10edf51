"""Metrics over evaluated rows: means, scores of answers, and bootstrap confidence intervals; independent of models."""

import math
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from qlora_api.report import Confidence, EvaluatedRow, Interval, Intervals, RowScore
from qlora_api.v1alpha1 import EvaluationStatus, Metrics

CONFIDENCE: Final = 0.95
"""Confidence level of the intervals."""
RESAMPLES: Final = 2000
"""Enough for two stable digits of a 95 % percentile interval (Efron and Tibshirani 1993, section 13.3, say 1000)."""
RESAMPLING_SEED: Final = 0
"""Fixed, so that two reports on the same rows differ only by their models."""
MAX_EXPONENT: Final = 700.0
"""exp() of a larger number overflows a 64-bit float."""

Numbers: TypeAlias = NDArray[np.float64]

_WORD: Final = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+")
"""A word in any script; Chinese and Japanese have no spaces, so each character counts as a word."""


class _Words:
    """Splits English like rouge-score, and other scripts too, of which rouge-score drops every letter."""

    def tokenize(self, text: str) -> list[str]:
        return _WORD.findall(text.lower())


@lru_cache(maxsize=1)
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # noqa: PLC0415 (takes seconds to import)

    return RougeScorer(["rougeL"], tokenizer=_Words())


def rouge_l(reference: str, answer: str) -> float:
    """Return the F-measure of the longest common subsequence of words."""
    return float(_rouge().score(reference, answer)["rougeL"].fmeasure)


def exact_match(reference: str, answer: str) -> float:
    """Return 1 if both are equal except for whitespace, otherwise 0."""
    return float(reference.split() == answer.split())


def score(loss: float, correct: int, reference: str, answer: str | None) -> RowScore:
    """Return one model's scores on one row."""
    if answer is None:
        return RowScore(loss=loss, correct=correct)
    return RowScore(
        loss=loss,
        correct=correct,
        answer=answer,
        exact_match=exact_match(reference, answer),
        rouge_l=rouge_l(reference, answer),
    )


def perplexity(loss: float) -> float:
    """Return exp(loss), capped to avoid overflow."""
    return math.exp(min(loss, MAX_EXPONENT))


def summarize(rows: Sequence[EvaluatedRow]) -> EvaluationStatus:
    """Return the metrics of base and adapter."""
    return EvaluationStatus(
        base=_metrics(rows, lambda row: row.base),
        adapter=_metrics(rows, lambda row: row.adapter),
        rows=len(rows),
        tokens=sum(row.tokens for row in rows),
        answers=len(answered(rows)),
    )


def answered(rows: Sequence[EvaluatedRow]) -> list[EvaluatedRow]:
    """Return the rows with answers of both models."""
    return [row for row in rows if row.base.answer is not None and row.adapter.answer is not None]


def _metrics(rows: Sequence[EvaluatedRow], side: Callable[[EvaluatedRow], RowScore]) -> Metrics:
    tokens = sum(row.tokens for row in rows)
    loss = math.fsum(side(row).loss for row in rows) / tokens
    scores = [side(row) for row in answered(rows)]
    return Metrics(
        loss=loss,
        perplexity=perplexity(loss),
        token_accuracy=sum(side(row).correct for row in rows) / tokens,
        exact_match=math.fsum(scored.exact_match or 0 for scored in scores) / len(scores) if scores else None,
        rouge_l=math.fsum(scored.rouge_l or 0 for scored in scores) / len(scores) if scores else None,
    )


def estimate_confidence(rows: Sequence[EvaluatedRow]) -> Confidence:
    """Return bootstrap confidence intervals; rows and answers are resampled independently."""
    base, adapter = _resampled_means(rows, lambda row: row.base), _resampled_means(rows, lambda row: row.adapter)
    return Confidence(
        level=CONFIDENCE,
        resamples=RESAMPLES,
        seed=RESAMPLING_SEED,
        base=_intervals(base),
        adapter=_intervals(adapter),
        change=_intervals({name: adapter[name] - base[name] for name in base}),
    )


def _resampled_means(
    rows: Sequence[EvaluatedRow], side: Callable[[EvaluatedRow], RowScore]
) -> dict[str, NDArray[np.float64]]:
    """Return each metric per resample; base and adapter use the same seed, so their resamples are paired."""
    sums = _resampled_sums([(row.tokens, side(row).loss, side(row).correct) for row in rows])
    loss = sums[:, 1] / sums[:, 0]
    means = {
        "loss": loss,
        "perplexity": np.exp(np.minimum(loss, MAX_EXPONENT)),
        "token_accuracy": sums[:, 2] / sums[:, 0],
    }
    if scores := [side(row) for row in answered(rows)]:
        totals = _resampled_sums([(scored.exact_match, scored.rouge_l) for scored in scores])
        means |= {"exact_match": totals[:, 0] / len(scores), "rouge_l": totals[:, 1] / len(scores)}
    return means


def _resampled_sums(values: Sequence[tuple[float | None, ...]]) -> Numbers:
    """Return the column sums of RESAMPLES bootstrap samples of the table's rows."""
    table, generator = np.array(values, dtype=np.float64), np.random.default_rng(RESAMPLING_SEED)
    count = len(table)
    return np.stack([table[generator.integers(0, count, count)].sum(axis=0) for _ in range(RESAMPLES)])


def _intervals(means: dict[str, Numbers]) -> Intervals:
    tail = 50 * (1 - CONFIDENCE)
    bounds = {name: np.percentile(values, [tail, 100 - tail]) for name, values in means.items()}
    return Intervals(**{name: Interval(low=float(low), high=float(high)) for name, (low, high) in bounds.items()})
