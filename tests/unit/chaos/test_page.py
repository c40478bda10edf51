"""The page of promises is brought up to date by what ran, and only by that."""

from datetime import date
from pathlib import Path

import pytest

from tests.chaos.page import BEGIN, END, Row, read_row, render_page, split_page
from tests.chaos.promises import Record

ROOT = Path(__file__).parents[3]
HERE = "tests/unit/chaos/test_page.py"
DAY = date(2026, 3, 1)


def row(fault: str, result: str = "passed, 2026-03-01", test: str = "test_row_survives_round_trip") -> Row:
    return Row(fault, "nothing is lost", f"a kill ([{test}](../{HERE}))", result)


def page_with(*rows: Row) -> str:
    return render_page(f"# Title\n\n{BEGIN}\n\n{END}\n\nFoot\n", rows, ROOT)


@pytest.mark.parametrize("fault", ["a kill", "a | b", "|", "`a | b` | c"])
def test_row_survives_round_trip(fault: str) -> None:
    assert read_row(row(fault).render()) == row(fault)


def test_text_around_table_is_kept() -> None:
    before, rows, after = split_page(page_with(row("a kill")))
    assert (before, rows, after) == ("# Title\n\n", [row("a kill")], "\n\nFoot\n")


@pytest.mark.parametrize(
    ("new", "expected"),
    [
        pytest.param([], [row("one"), row("two")], id="nothing-ran"),
        pytest.param([row("one", "failed")], [row("one", "failed"), row("two")], id="in-its-place"),
        pytest.param([row("three")], [row("one"), row("two"), row("three")], id="a-new-one-at-the-end"),
    ],
)
def test_rows_of_other_tests_are_kept(new: list[Row], expected: list[Row]) -> None:
    page = page_with(row("one"), row("two"), row("gone", test="test_that_is_gone"))
    assert split_page(render_page(page, new, ROOT))[1] == expected


@pytest.mark.parametrize(
    ("tests", "lines", "expected"),
    [
        ({"a": True}, [], "passed, 2026-03-01"),
        ({"a": True, "b": True}, ["3 of 3", "3 of 3", "1 s"], "passed, 2026-03-01; 3 of 3; 1 s"),
        ({"a": True, "b": False}, ["3 of 3"], "**failed** (1 of 2), 2026-03-01; 3 of 3"),
    ],
)
def test_cases_of_promise_share_result(tests: dict[str, bool], lines: list[str], expected: str) -> None:
    assert Record("a kill", tests, lines).result(DAY) == expected


def test_reliability_page_is_parsed() -> None:
    page = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
    assert render_page(page, [], ROOT) == page
