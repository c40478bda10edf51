import io
import re

import pytest
from rich.console import Console

from qlora_api.names import Phase
from qlora_cli.display.progress import PREPARING, LineScreen, clock_time, format_progress, name_stage, open_screen
from tests.unit.cli.make import make_progress

CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def test_progress_is_described_by_what_is_known():
    assert format_progress(make_progress(1)) == " 33%  step 1/3  loss 3.750  225 tok/s  2:10 left"
    assert format_progress(make_progress(3)) == "100%  step 3/3  loss 3.250  225 tok/s"
    unknown = make_progress(0).model_copy(
        update={"step": None, "loss": None, "tokens_per_second": None, "remaining_seconds": None}
    )
    assert format_progress(unknown) == ""


@pytest.mark.parametrize(("seconds", "text"), [(5, "0:05"), (130, "2:10"), (3725, "1:02:05")])
def test_time_left_reads_like_a_clock(seconds, text):
    assert clock_time(seconds) == text


def test_stage_name_follows_progress_reports():
    start = make_progress(0).model_copy(update={"loss": None, "tokens_per_second": None, "remaining_seconds": None})
    reports = [
        start,
        start.model_copy(update={"phase": Phase.EVALUATING}),
        start,
        make_progress(1),
        make_progress(3, Phase.EVALUATING),
        make_progress(3, Phase.PUBLISHING),
    ]
    stages: list[tuple[str, str]] = []
    for report in reports:
        stages.append(name_stage(report, stages[-1][0] if stages else PREPARING))
    assert stages == [
        ("Loading", ""),
        ("Evaluating", "base model"),
        ("Training", "  0%  step 0/3"),
        ("Training", format_progress(make_progress(1))),
        ("Evaluating", "adapter"),
        ("Publishing", ""),
    ]


def test_line_output_is_rate_limited():
    stream, now = io.StringIO(), iter([0.0, 3.0, 11.0, 12.0, 13.0])
    screen = LineScreen(Console(file=stream, width=80), clock=lambda: next(now))
    for progress in (make_progress(0), make_progress(1), make_progress(2), make_progress(3)):
        screen.report(progress)
    screen.report(make_progress(3, Phase.PUBLISHING))
    assert [line.split()[:2] for line in stream.getvalue().splitlines()] == [
        ["Training", "0%"],
        ["Training", "66%"],
        ["Training", "100%"],
        ["Publishing"],
    ]


def test_terminal_shows_one_bar_per_phase_within_its_width():
    stream = io.StringIO()
    console = Console(file=stream, width=80, force_terminal=True, color_system=None, legacy_windows=False)
    with open_screen(console) as screen:
        screen.note("a note")
        screen.report(make_progress(0, Phase.EVALUATING))
        screen.report(make_progress(1))
        screen.report(make_progress(3))
        screen.report(make_progress(3, Phase.PUBLISHING))
    last = [line for line in CONTROL.sub("", stream.getvalue()).splitlines() if line.strip()][-4:]
    assert [line.split()[:2] for line in last] == [
        ["✓", "Preparing"],
        ["✓", "Evaluating"],
        ["✓", "Training"],
        ["✓", "Publishing"],
    ]
    assert "100%  step 3/3  loss 3.250  225 tok/s" in last[2]
    assert max(map(len, last)) <= 80


def test_terminal_highlights_supervised_tokens():
    stream = io.StringIO()
    with open_screen(
        Console(file=stream, force_terminal=True, color_system="standard", legacy_windows=False)
    ) as screen:
        screen.note("Sky? ⟦Blue.</s>⟧")
    assert "\x1b[2mSky? \x1b[0m\x1b[32m⟦Blue.</s>⟧\x1b[0m" in stream.getvalue()
