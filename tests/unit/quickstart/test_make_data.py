import json
import re
import sys
from pathlib import Path

import pytest

from examples.quickstart import make_data

FILES = (make_data.TRAIN, make_data.HELD_OUT)
INSTRUCTION = re.compile(r"What does the Python (?:function|method|class) `((?:\w+\.)+\w+)` do\?")


def load(folder: Path, name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_data.make_data(folder)
    return folder


@pytest.fixture(params=["committed", "made"])
def folder(request) -> Path:
    return make_data.DATA if request.param == "committed" else request.getfixturevalue("made")


def test_rows_have_the_form_that_the_trainer_reads(folder):
    for name in FILES:
        for row in load(folder, name):
            assert row.keys() == {"instruction", "response"}
            assert INSTRUCTION.fullmatch(row["instruction"]), row
            assert 20 <= len(row["response"]) <= 160, row
            assert row["response"].endswith("."), row


def test_there_are_enough_rows_to_learn_from_and_to_judge_by(folder):
    assert len(load(folder, make_data.TRAIN)) >= 600
    assert len(load(folder, make_data.HELD_OUT)) >= 80


def test_no_answer_occurs_twice_in_either_file(folder):
    answers = [row["response"].lower() for name in FILES for row in load(folder, name)]
    assert len(set(answers)) == len(answers)


def test_whole_modules_are_held_out(folder):
    def modules(name: str) -> set[str]:
        paths = (INSTRUCTION.fullmatch(row["instruction"])[1] for row in load(folder, name))
        return {path.split(".")[0] for path in paths}

    assert modules(make_data.HELD_OUT) == make_data.HELD_OUT_MODULES
    assert modules(make_data.TRAIN).isdisjoint(make_data.HELD_OUT_MODULES)


def test_the_same_python_makes_the_same_rows(made, tmp_path):
    make_data.make_data(tmp_path)
    assert [(tmp_path / name).read_bytes() for name in FILES] == [(made / name).read_bytes() for name in FILES]


@pytest.mark.skipif(
    sys.version_info[:2] != (3, 11) or sys.platform != "linux", reason="data/ is from Python 3.11 on Linux"
)
def test_the_committed_rows_are_those_of_the_script(made):
    for name in FILES:
        ours, theirs = load(made, name), load(make_data.DATA, name)
        assert len([row for row in ours if row in theirs]) >= 0.98 * len(theirs), "only a patch release may differ"


def test_the_committed_rows_are_small_enough_for_git():
    assert sum((make_data.DATA / name).stat().st_size for name in FILES) < 300_000


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("Return the sum of a and b.\n\nMore text.", "Return the sum of a and b."),
        ("Return the sum of\n   a and b. More text.", "Return the sum of a and b."),
        ("sum(a, b) -> int", None),
        ("Too short.", None),
        ("x" * 300 + ".", None),
        ("Return what >>> shows in a session.", None),
        (None, None),
    ],
)
def test_only_a_first_sentence_of_prose_becomes_an_answer(docstring, sentence):
    assert make_data.first_sentence(docstring) == sentence
