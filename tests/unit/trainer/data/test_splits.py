"""Validation split, source weights and dataset digest depend on row content only."""

import pytest

from qlora_api.reasons import Reason
from qlora_trainer.data.rows import Chat, Example, group_of
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


def split(sources: list[list[Example]], fraction: float) -> frozenset[bytes]:
    groups = [[group_of(row) for row in rows] for rows in sources]
    return split_validation(
        [[row.digest for row in rows] for rows in sources], groups, fraction, DATASET_FIELD
    ).held_out


def examples(count: int, *answers: str) -> list[Example]:
    return [Example(f"question {number}", answer) for number in range(count) for answer in answers or ("answer",)]


@pytest.mark.parametrize(("rows", "fraction", "held_out"), [(100, 0.05, 5), (3, 0.05, 1), (2, 0.5, 1), (2, 0.01, 1)])
def test_split_holds_out_fraction_and_at_least_one_row(rows, fraction, held_out):
    assert len(split([examples(rows)], fraction)) == held_out


def test_split_depends_on_row_content_only():
    rows = examples(50, "yes", "no")
    assert split([rows], 0.2) == split([rows[30:], rows[29::-1]], 0.2)


def test_split_keeps_duplicates_on_one_side():
    rows = digests(20) * 3
    held_out = split([examples(20) * 3], 0.2)
    source_weight = make_source_weight(rows, 1, held_out)
    training = list(training_digests([rows], [source_weight]))
    assert (len(training), len(held_out)) == (48, 4)
    assert not held_out & set(training)


def test_split_of_different_questions_is_the_rows_with_the_lowest_hashes():
    assert split([examples(100)], 0.1) == frozenset(sorted(digests(100))[:10])


@pytest.mark.parametrize(
    "copies",
    [
        pytest.param([Example("Name {}", "Bo"), Example("Name {}", "Al")], id="answers"),
        pytest.param([Example("Name {}", "Bo"), Example(" name\n{} ", "Bo")], id="white-space-and-case"),
        pytest.param([Example("\uff2eame {}", "Bo"), Example("Name {}", "Bo.")], id="unicode-form"),
        pytest.param([Example("Name {}", str(number)) for number in range(7)], id="seven-answers"),
    ],
)
def test_rows_with_the_same_question_are_on_one_side(copies):
    rows = [Example(copy.prompt.format(number), copy.answer) for number in range(40) for copy in copies]
    held_out = split([rows], 0.2)
    sides = {(group_of(row), row.digest in held_out) for row in rows}
    assert len({group for group, _ in sides}) == len(sides) == 40
    assert 0.1 * len(rows) <= len(held_out) <= 0.2 * len(rows)


def test_conversation_cut_into_rows_is_on_one_side():
    turns = [{"role": role, "content": role} for role in ("user", "assistant") * 3]
    rows = [
        Chat(({"role": "user", "content": f"Hi {number}"}, *turns[1 : 2 * length]))
        for number in range(20)
        for length in (1, 2, 3)
    ]
    assert len({group_of(row) for row in rows}) == 20


def test_rows_of_large_group_are_not_held_out_unless_nothing_else_is():
    common = [Example("Hello", str(number)) for number in range(60)]
    held_out = split([[*common, *examples(40)]], 0.1)
    assert len(held_out) == 10
    assert not held_out & {row.digest for row in common}
    assert split([[*common, Example("Bye", "a"), Example("Bye", "b")]], 0.01) == {
        Example("Bye", "a").digest, Example("Bye", "b").digest
    }  # fmt: skip


def test_rows_that_all_have_one_question_are_split_by_row():
    rows = [Example("Write a poem.", str(number)).digest for number in range(10)]
    found = split_validation([rows], [[7] * 10], 0.2, DATASET_FIELD)
    assert (found.held_out, found.by_question) == (frozenset(sorted(rows)[:2]), False)


def test_split_of_one_distinct_row_is_refused():
    with pytest.raises(RunError) as caught:
        split([examples(1) * 5], 0.5)
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


def test_few_questions_with_many_rows_are_split_by_row():
    """Half of the rows, or a single one, would be held out by question."""
    for sizes in ((500, 500), (400, 300, 300), (499, 499, 1)):
        rows = [
            Example(f"question {number}", f"answer {row}") for number, size in enumerate(sizes) for row in range(size)
        ]
        assert len(split([rows], 0.05)) == round(0.05 * len(rows))


def test_same_question_about_different_documents_is_not_the_same_prompt():
    chats = [
        Chat(
            (
                {"role": "system", "content": f"document {number}"},
                {"role": "user", "content": "Summarize it."},
                {"role": "assistant", "content": "Done."},
            )
        )
        for number in range(100)
    ]
    assert len({chat.question for chat in chats}) == 100
