"""What is held out, what is learned from and how often: decided by content alone."""

import pytest

from qlora_api.names import Reason
from qlora_trainer.data.rows import Example
from qlora_trainer.data.splits import check_some_are_left, digest_of, hold_out, learned_from, portion
from qlora_trainer.errors import RunError
from qlora_trainer.storage.store import DATASET

NOTHING = frozenset()


def digests(count: int, question: str = "question") -> list[bytes]:
    return [Example(f"{question} {number}", "answer").digest for number in range(count)]


@pytest.mark.parametrize(("rows", "fraction", "held_out"), [(100, 0.05, 5), (3, 0.05, 1), (2, 0.5, 1), (2, 0.01, 1)])
def test_the_share_is_held_out_and_at_least_one_row(rows, fraction, held_out):
    assert len(hold_out([digests(rows)], fraction, DATASET)) == held_out


def test_which_rows_are_held_out_depends_on_content_alone():
    rows = digests(50)
    assert hold_out([rows], 0.2, DATASET) == hold_out([rows[30:], rows[29::-1]], 0.2, DATASET)


def test_copies_of_a_row_stay_on_one_side():
    rows = digests(20) * 3
    held_out = hold_out([rows], 0.2, DATASET)
    share = portion(rows, 1, held_out)
    learned = list(learned_from([rows], [share]))
    assert (len(learned), len(held_out)) == (48, 4)
    assert not held_out & set(learned)


def test_one_distinct_row_cannot_be_split():
    with pytest.raises(RunError) as caught:
        hold_out([digests(1) * 5], 0.5, DATASET)
    assert caught.value.reason == Reason.DATASET_EMPTY


@pytest.mark.parametrize(
    ("weight", "seen"),
    [(1, [1] * 10), (2, [2] * 10), (0.3, [0] * 7 + [1] * 3), (2.5, [2] * 5 + [3] * 5), (0.04, [0] * 10)],
)
def test_a_weight_is_how_often_an_epoch_sees_a_row(weight, seen):
    rows = digests(10)
    share = portion(rows, weight, NOTHING)
    assert sorted(share.times(row) for row in rows) == seen


def test_the_rows_of_a_broken_weight_are_those_with_the_lowest_hashes_that_are_not_held_out():
    rows = digests(10)
    lowest = sorted(rows)
    share = portion(rows, 1.5, frozenset(lowest[:2]))
    assert [share.times(row) for row in lowest] == [0, 0, 2, 2, 2, 2, 1, 1, 1, 1]


def test_sources_keep_their_order_and_their_weights():
    one, other = digests(2), digests(2, "other")
    shares = [portion(one, 2, NOTHING), portion(other, 1, NOTHING)]
    assert list(learned_from([one, other], shares)) == [one[0], one[0], one[1], one[1], *other]


def test_no_row_may_be_left_by_the_held_out_ones():
    rows = digests(3)
    with pytest.raises(RunError) as caught:
        check_some_are_left([rows], [portion(rows, 1, frozenset(rows))], DATASET)
    assert caught.value.reason == Reason.DATASET_EMPTY


def test_the_datas_digest_tells_the_sides_and_repeats_apart():
    rows = digests(3)
    different = {digest_of(rows[:2], rows[2:]), digest_of(rows[:1], rows[1:]), digest_of(rows[:2] * 2, rows[2:])}
    assert len(different) == 3
