"""Validation split, source weights and dataset digest depend on row content only."""

import pytest

from qlora_api.reasons import Reason
from qlora_trainer.data.rows import Example
from qlora_trainer.data.splits import (
    check_training_rows_left,
    dataset_digest,
    make_source_weight,
    split_validation,
    training_digests,
)
from qlora_trainer.errors import RunError
from qlora_trainer.storage.store import DATASET_FIELD

NOTHING = frozenset()


def digests(count: int, question: str = "question") -> list[bytes]:
    return [Example(f"{question} {number}", "answer").digest for number in range(count)]


@pytest.mark.parametrize(("rows", "fraction", "held_out"), [(100, 0.05, 5), (3, 0.05, 1), (2, 0.5, 1), (2, 0.01, 1)])
def test_split_holds_out_fraction_and_at_least_one_row(rows, fraction, held_out):
    assert len(split_validation([digests(rows)], fraction, DATASET_FIELD)) == held_out


def test_split_depends_on_row_content_only():
    rows = digests(50)
    assert split_validation([rows], 0.2, DATASET_FIELD) == split_validation(
        [rows[30:], rows[29::-1]], 0.2, DATASET_FIELD
    )


def test_split_keeps_duplicates_on_one_side():
    rows = digests(20) * 3
    held_out = split_validation([rows], 0.2, DATASET_FIELD)
    source_weight = make_source_weight(rows, 1, held_out)
    training = list(training_digests([rows], [source_weight]))
    assert (len(training), len(held_out)) == (48, 4)
    assert not held_out & set(training)


def test_split_of_one_distinct_row_is_refused():
    with pytest.raises(RunError) as caught:
        split_validation([digests(1) * 5], 0.5, DATASET_FIELD)
    assert caught.value.reason == Reason.DATASET_EMPTY


@pytest.mark.parametrize(
    ("weight", "repeats"),
    [(1, [1] * 10), (2, [2] * 10), (0.3, [0] * 7 + [1] * 3), (2.5, [2] * 5 + [3] * 5), (0.04, [0] * 10)],
)
def test_weight_is_repeats_of_a_row_per_epoch(weight, repeats):
    rows = digests(10)
    source_weight = make_source_weight(rows, weight, NOTHING)
    assert sorted(source_weight.times(row) for row in rows) == repeats


def test_fractional_weight_repeats_training_rows_with_lowest_hashes():
    rows = digests(10)
    lowest = sorted(rows)
    source_weight = make_source_weight(rows, 1.5, frozenset(lowest[:2]))
    assert [source_weight.times(row) for row in lowest] == [0, 0, 2, 2, 2, 2, 1, 1, 1, 1]


def test_training_digests_keep_source_order_and_weights():
    one, other = digests(2), digests(2, "other")
    source_weights = [make_source_weight(one, 2, NOTHING), make_source_weight(other, 1, NOTHING)]
    assert list(training_digests([one, other], source_weights)) == [one[0], one[0], one[1], one[1], *other]


def test_split_without_training_rows_is_refused():
    rows = digests(3)
    with pytest.raises(RunError) as caught:
        check_training_rows_left([rows], [make_source_weight(rows, 1, frozenset(rows))], DATASET_FIELD)
    assert caught.value.reason == Reason.DATASET_EMPTY


def test_dataset_digest_depends_on_split_and_repeats():
    rows = digests(3)
    different = {
        dataset_digest(rows[:2], rows[2:]),
        dataset_digest(rows[:1], rows[1:]),
        dataset_digest(rows[:2] * 2, rows[2:]),
    }
    assert len(different) == 3
