"""Rows: what is refused and with which words, and what is held out."""

import json
from pathlib import Path

import pytest

from qlora_api.names import Reason
from qlora_trainer.errors import RunError
from qlora_trainer.rows import Example, digest_of, load_examples, split, to_example, without
from qlora_trainer.store import DATASET

GOOD = '{"instruction": "Say hi", "output": "hi"}'


def load(tmp_path: Path, content: str | bytes, wanted: str = "auto", limit: int | None = None):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return load_examples(path, DATASET, wanted, limit)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param(GOOD + "\n{oops\n", "row 2: broken JSON at column 2", id="broken"),
        pytest.param(GOOD + "\n\n\n[1]\n", "row 4: is a JSON list, not an object", id="blank-lines-count"),
        pytest.param(GOOD + '\n{"instruction": "x"}', "row 2: field 'response' (or 'output') is missing", id="missing"),
        pytest.param(GOOD + '\n{"instruction": " ", "output": "y"}', "row 2: field 'instruction' is empty", id="empty"),
        pytest.param(GOOD + '\n{"instruction": "x", "output": 7}', "field 'output' is a JSON int", id="no-string"),
        pytest.param(GOOD + '\n{"instruction": "x", "output": null}', "is a JSON NoneType", id="null"),
        pytest.param(GOOD + '\n{"instruction": "x", "input": 1, "output": "y"}', "field 'input' is", id="input"),
        pytest.param(GOOD + '\n{"instruction": "x", "output": "y", "response": "z"}', "keep one", id="both"),
        pytest.param(GOOD.encode() + b'\n{"instruction": "\xff"}', "row 2: byte 18 is not UTF-8", id="encoding"),
        pytest.param('{"text": "x"}', "row 1 has the fields text; write instruction", id="unknown-format"),
        pytest.param('{"prompt": "x"}', "row 1: field 'completion' is missing", id="completion"),
        pytest.param("{oops\n" * 9, "9 of 9 rows cannot be used", id="all-broken"),
    ],
)
def test_a_broken_row_is_named(tmp_path, content, expected):
    with pytest.raises(RunError, match=r"spec\.dataset\.uri") as caught:
        load(tmp_path, content)
    assert caught.value.reason == Reason.DATASET_INVALID
    assert expected in caught.value.message


def test_many_broken_rows_are_counted_and_the_first_ones_shown(tmp_path):
    with pytest.raises(RunError) as caught:
        load(tmp_path, "\n".join([GOOD] + ["{}"] * 100))
    assert "100 of 101 rows" in caught.value.message
    assert caught.value.message.endswith("row 6: field 'instruction' is missing; and 95 more")


@pytest.mark.parametrize("content", ["", "\n\n", "\ufeff\n"])
def test_no_rows(tmp_path, content):
    with pytest.raises(RunError) as caught:
        load(tmp_path, content)
    assert caught.value.reason == Reason.DATASET_EMPTY


def test_no_file(tmp_path):
    with pytest.raises(RunError) as caught:
        load_examples(tmp_path / "absent.jsonl", DATASET, "auto", None)
    assert caught.value.reason == Reason.DATASET_NOT_FOUND


@pytest.mark.parametrize(
    ("row", "row_format", "expected"),
    [
        pytest.param(
            {"instruction": "Add", "output": "3"},
            "instruction",
            Example("### Instruction:\nAdd\n\n### Response:\n", "3"),
            id="instruction",
        ),
        pytest.param(
            {"instruction": "Add", "input": "1 2", "response": "3"},
            "instruction",
            Example("### Instruction:\nAdd\n\n### Input:\n1 2\n\n### Response:\n", "3"),
            id="input-and-response",
        ),
        pytest.param(
            {"instruction": "Add", "input": None, "output": "3", "source": "book"},
            "instruction",
            Example("### Instruction:\nAdd\n\n### Response:\n", "3"),
            id="no-input-and-other-fields",
        ),
        pytest.param({"prompt": "1+2=", "completion": "3"}, "completion", Example("1+2=", "3"), id="completion"),
    ],
)
def test_template(row, row_format, expected):
    assert to_example(row, row_format) == expected


def test_auto_tells_the_format_and_a_limit_reads_no_further(tmp_path):
    row = json.dumps({"prompt": "a", "completion": "b"})
    assert load(tmp_path, f"{row}\n{row}\n{{broken", limit=2) == ("completion", [Example("a", "b")] * 2)


def examples(count: int) -> list[Example]:
    return [Example(f"question {number}", "answer") for number in range(count)]


@pytest.mark.parametrize(
    ("rows", "fraction", "held_out"),
    [(100, 0.05, 5), (3, 0.05, 1), (2, 0.5, 1), (2, 0.01, 1)],
)
def test_split_holds_out_the_share_and_at_least_one_row(rows, fraction, held_out):
    training, evaluation = split(examples(rows), fraction, DATASET)
    assert (len(training), len(evaluation)) == (rows - held_out, held_out)
    assert not set(training) & set(evaluation)


def test_split_depends_on_content_alone():
    rows = examples(50)
    assert set(split(rows, 0.2, DATASET)[1]) == set(split(rows[::-1], 0.2, DATASET)[1])


def test_copies_of_a_row_stay_on_one_side():
    rows = examples(20) * 3
    training, evaluation = split(rows, 0.2, DATASET)
    assert len(training) + len(evaluation) == 60
    assert not set(training) & set(evaluation)


def test_one_distinct_row_cannot_be_split():
    with pytest.raises(RunError) as caught:
        split(examples(1) * 5, 0.5, DATASET)
    assert caught.value.reason == Reason.DATASET_EMPTY


def test_held_out_rows_are_not_trained_on():
    rows = examples(5)
    assert without(rows, rows[:2], DATASET) == rows[2:]
    with pytest.raises(RunError) as caught:
        without(rows, rows, DATASET)
    assert caught.value.reason == Reason.DATASET_EMPTY


def test_data_digest_tells_the_sides_apart():
    rows = examples(3)
    assert digest_of(rows[:2], rows[2:]) != digest_of(rows[:1], rows[1:])
