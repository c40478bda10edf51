"""A validation set that is too small to tell better from worse: no figure is colored, and every view says so."""

import io
import re

import pytest
from rich.console import Console

from qlora_api.report import RunReport
from qlora_cli.display.result import comparison_table
from qlora_trainer.publishing.html_report import make_comparison, make_tiles, render_html
from qlora_trainer.publishing.model_card import render_card
from tests.unit.trainer.publishing.test_model_card import make_report

SENTENCE = "too few to tell whether the adapter is better or worse"


def evaluated(rows: int, tokens: int) -> RunReport:
    report = make_report()
    base = report.evaluation.base.model_copy(update={"loss": 2.0})
    adapter = report.evaluation.adapter.model_copy(update={"loss": 1.0})
    evaluation = report.evaluation.model_copy(update={"rows": rows, "tokens": tokens, "base": base, "adapter": adapter})
    made = {"versions": {"qlora-operator": "0.1.0"}, "choices": {"device": "CPU"}}
    return report.model_copy(update={"evaluation": evaluation, **made})


def printed(report: RunReport) -> str:
    sink = io.StringIO()
    Console(file=sink, width=200).print(comparison_table(report.evaluation))
    return sink.getvalue()


@pytest.mark.parametrize(
    ("rows", "tokens", "enough"),
    [
        pytest.param(30, 200, True, id="enough"),
        pytest.param(29, 5000, False, id="few-rows"),
        pytest.param(5000, 199, False, id="few-tokens"),
        pytest.param(1, 1, False, id="one"),
    ],
)
def test_changes_are_colored_from_30_rows_and_200_tokens_on(rows: int, tokens: int, enough: bool):
    report = evaluated(rows, tokens)
    tones = [item.tone for item in (*make_tiles(report), *make_comparison(report)) if item.tone]
    assert bool(tones) is enough
    page = render_html(report)
    assert bool(re.search(r"<(td|dd)[^>]* class=\"(good|bad)\"", page)) is enough
    for view in (page, render_card(report), printed(report)):
        assert (SENTENCE in " ".join(view.split())) is not enough
