"""Scores and confidence intervals, against published or analytical values."""

import math

import numpy as np
import pytest

from qlora_api.report import EvaluatedRow, RowScore
from qlora_trainer.evaluation import scoring
from qlora_trainer.evaluation.scoring import estimate_confidence, exact_match, rouge_l, summarize


@pytest.mark.parametrize(
    ("reference", "answer", "expected"),
    [
        # Sentences S2 and S3 of Lin (2004), "ROUGE", section 3.1.
        pytest.param("police killed the gunman", "police kill the gunman", 3 / 4, id="lin-s2"),
        pytest.param("police killed the gunman", "the gunman kill police", 2 / 4, id="lin-s3"),
        pytest.param("the cat", "the cat sat on the mat", 2 * (2 / 6) / (1 + 2 / 6), id="longer-answer"),
        pytest.param("Same words.", "same, WORDS", 1.0, id="case-and-punctuation"),
        pytest.param("a b", "", 0.0, id="no-answer"),
        pytest.param("привет мир", "привет друг", 1 / 2, id="cyrillic"),
        pytest.param("天空是蓝色", "天空很蓝", 2 * 3 / 9, id="chinese"),
    ],
)
def test_rouge_l(reference, answer, expected):
    assert rouge_l(reference, answer) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("reference", "answer", "expected"),
    [("a b", " a\n b ", 1.0), ("a b", "A b", 0.0), ("a b", "a b.", 0.0), ("a", "", 0.0)],
)
def test_exact_match_ignores_only_whitespace(reference, answer, expected):
    assert exact_match(reference, answer) == expected


def make_rows(count: int, seed: int = 0, *, gain: float = 0.5) -> list[EvaluatedRow]:
    """Rows whose token losses are exponential with mean 2; the adapter's are lower by `gain`."""
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        tokens = int(generator.integers(5, 50))
        loss = float(generator.exponential(2.0, tokens).sum())
        base = RowScore(loss=loss, correct=tokens // 3, answer="a", exact_match=0.0, rouge_l=0.25)
        adapter = RowScore(loss=loss - gain * tokens, correct=tokens // 2, answer="b", exact_match=1.0, rouge_l=0.75)
        rows.append(EvaluatedRow(tokens=tokens, prompt="p", reference="b", base=base, adapter=adapter))
    return rows


def test_means_are_over_tokens_and_answers():
    one = RowScore(loss=6.0, correct=1, answer="x", exact_match=1.0, rouge_l=1.0)
    other = RowScore(loss=1.0, correct=1)
    rows = [
        EvaluatedRow(tokens=3, prompt="", reference="", base=one, adapter=one),
        EvaluatedRow(tokens=1, prompt="", reference="", base=other, adapter=other),
    ]
    found = summarize(rows)
    assert (found.rows, found.tokens, found.answers) == (2, 4, 1)
    assert found.base.model_dump() == {
        "loss": 7 / 4,
        "perplexity": math.exp(7 / 4),
        "token_accuracy": 2 / 4,
        "exact_match": 1.0,
        "rouge_l": 1.0,
    }


def test_rows_without_answers_have_no_answer_scores():
    unanswered = RowScore(loss=1.0, correct=0)
    rows = [EvaluatedRow(tokens=1, prompt="", reference="", base=unanswered, adapter=unanswered)] * 3
    assert (summarize(rows).adapter.exact_match, summarize(rows).answers) == (None, 0)
    assert estimate_confidence(rows).change.rouge_l is None


def test_intervals_have_their_nominal_coverage():
    """The true mean is 2: about 38 of 40 intervals contain it; fewer than 34 have probability 0.01."""
    covering = sum(
        interval.low <= 2.0 <= interval.high
        for interval in (estimate_confidence(make_rows(60, seed)).base.loss for seed in range(40))
    )
    assert 34 <= covering <= 40


def test_paired_intervals_of_a_constant_gain_have_zero_width():
    found = estimate_confidence(make_rows(40))
    assert (found.change.loss.low, found.change.loss.high) == (pytest.approx(-0.5), pytest.approx(-0.5))
    assert found.base.loss.high - found.base.loss.low > 0.1
    assert (found.change.exact_match.low, found.change.rouge_l.high) == (1.0, 0.5)


def test_intervals_are_deterministic():
    assert estimate_confidence(make_rows(20)) == estimate_confidence(make_rows(20))
    assert (scoring.RESAMPLES, scoring.CONFIDENCE) == (2000, 0.95)
