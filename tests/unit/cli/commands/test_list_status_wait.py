"""`qlora list`, `status` and `wait` on what a cluster answers; tests/integration/test_cli.py has a real one."""

from datetime import timedelta
from typing import Any

import pytest
import typer

from qlora_api.crd import PRINTER_COLUMNS
from qlora_api.names import Phase
from qlora_api.reasons import Reason
from qlora_api.v1alpha1 import Attempt, OutputStatus
from qlora_cli.cluster.client import ClusterError, UnreachableError
from qlora_cli.cluster.jobs import parse_job, strip_managed_fields
from qlora_cli.cluster.polling import UNREACHABLE_TIMEOUT_SECONDS, poll_job
from qlora_cli.commands import list as listing
from qlora_cli.commands import status, wait
from qlora_cli.display.dashboard import LossHistory, describe_progress, render_dashboard
from qlora_cli.display.sparkline import sparkline
from tests.make import DIGEST, NOW, REF, make_plan_status, make_prepared, make_result
from tests.unit.cli.fake_cluster import (
    FAILED,
    SUCCEEDED,
    SUSPENDED,
    FakeClusterClient,
    FakeTime,
    PlainConsole,
    make_job,
    make_raw,
    make_raws,
    make_training,
    render_to_lines,
)


def test_list_has_the_youngest_last_and_cuts_nothing():
    long = "a-name-that-is-as-long-as-a-name-may-be-or-nearly-so"
    jobs = [parse_job(make_raw(long, make_training(40), age=60)), parse_job(make_raw("old", SUCCEEDED, age=90_000))]
    assert render_to_lines(listing.tabulate(listing.filter_by_phase(jobs, list(Phase)), NOW, namespaces=True)) == [
        f"{'NAMESPACE':<12}{'NAME':<55}PHASE       PROGRESS   ETA   LOSS   GPUS   ATTEMPT   REASON      AGE",
        f"{'ml':<12}{'old':<55}Succeeded   100%                           1         Published   1d01h",
        f"{'ml':<12}{long:<55}Training    40%                            1         Training    1m00s",
    ]


def test_wide_list_has_the_columns_of_kubectl_and_a_short_message():
    found = FAILED.model_copy(update={"gpus": 0, "step": "3/60", "summary": "spec.dataset.uri: no row can be used"})
    [heading, line] = render_to_lines(listing.tabulate([make_job(found)], NOW, namespaces=False, wide=True))
    shown = {name for name, *_ in PRINTER_COLUMNS}
    assert set(heading.split()) == {"NAME"} | {name.upper() for name in shown}
    assert line.split() == [
        "support-bot", "Failed", "0", "DatasetEmpty", "10m00s", "hf://HuggingFaceTB/SmolLM2-135M-Instruct", "3/60",
        *["spec.dataset.uri:", "no", "row", "can", "be", "used"],
    ]  # fmt: skip


def test_default_columns_of_list_have_the_order_of_kubectl():
    [heading] = render_to_lines(listing.tabulate([], NOW, namespaces=False))
    default = ["NAME", *(name.upper() for name, _, _, priority in PRINTER_COLUMNS if priority == 0)]
    assert [name for name in heading.split() if name != "ATTEMPT"] == default
    assert "REASON" in default


def test_list_shows_the_phases_that_are_asked_for():
    jobs = [make_job(SUCCEEDED), make_job(FAILED), make_job()]
    assert [job.phase for job in listing.filter_by_phase(jobs, [Phase.FAILED, Phase.PENDING])] == ["Failed", "Pending"]


def test_run_without_operator_says_how_to_find_one():
    lines = render_to_lines(render_dashboard(make_job(), LossHistory(), NOW, details=True))
    assert lines[0] == "support-bot in ml  Pending  10m00s"
    assert lines[1].startswith("not reconciled  no operator has reconciled it yet; if this lasts, check whether one is")


def test_status_shows_every_section():
    attempt = Attempt(
        number=1, job="support-bot-1", reason=Reason.EVICTED, message="low on memory", node="node-1",
        started_at=NOW, finished_at=NOW + timedelta(minutes=3),
    )  # fmt: skip
    prepared, result = make_prepared(), make_result()
    output = OutputStatus(digest=DIGEST, prefix=prepared.prefix, adapter=result.adapter, report=result.report)
    done = SUCCEEDED.model_copy(
        update={
            "model": prepared.model, "dataset": prepared.dataset, "plan": make_plan_status(), "attempts": (attempt,),
            "output": output, "evaluation": result.evaluation, "finished_at": NOW,
        }
    )  # fmt: skip
    lines = render_to_lines(render_dashboard(make_job(done), LossHistory(), NOW, details=True))
    assert lines[:9] == [
        "support-bot in ml  Succeeded  attempt 1  10m00s",
        "Published  Published it is",
        "model      hf://HuggingFaceTB/SmolLM2-135M-Instruct at aaaaaaaaaaaa, 134,515,008 weights",
        "data       950 training rows, 50 held-out rows, instruction",
        "plan       1 x CPU, single, micro-batch 8 x 2, 180 steps",
        f"adapter    {prepared.prefix}/adapter",
        f"report     {prepared.prefix}/report/report.html",
        "ATTEMPT   ENDED WITH   NODE     TOOK    MESSAGE",
        "1         Evicted      node-1   3m00s   low on memory",
    ]
    assert lines[9].startswith("50 held-out rows")


def test_time_left_counts_down_between_reports():
    report = make_training(25).last_report
    assert report
    later = NOW + timedelta(seconds=30)
    assert list(describe_progress(report, later)) == ["25%", "step 25/100", "2:00 left", "350 tok/s"]
    assert "0:00 left" in list(describe_progress(report, NOW + timedelta(hours=1)))


def test_watched_losses_are_drawn_as_sparkline():
    history = LossHistory()
    for step, loss in ((1, 4.0), (1, 4.0), (2, 3.0), (3, 2.0)):
        history = history.extend(make_job(make_training(step, loss)))
    assert history.losses == (4.0, 3.0, 2.0)
    assert "█▅▁  loss 2.000" in render_to_lines(
        render_dashboard(make_job(make_training(3, 2.0)), history, NOW, details=False)
    )


@pytest.mark.parametrize(
    ("numbers", "width", "line"),
    [([], 8, ""), ([2.0], 8, "▁"), ([1, 1, 1], 8, "▁▁▁"), (range(8), 8, "▁▂▃▄▅▆▇█"), (range(16), 4, "▁▃▆█")],
)
def test_a_sparkline(numbers: Any, width: int, line: str):
    assert sparkline(list(numbers), width) == line


def test_without_a_terminal_each_change_is_a_line():
    cluster = FakeClusterClient(*make_raws(None, make_training(1), make_training(1), make_training(2), SUCCEEDED))
    paper = PlainConsole()
    status.watch_job(cluster, REF, paper.console, FakeTime().clock)
    assert paper.lines == [
        "Pending",
        "Training      1%  step 1/100  loss 3.000  350 tok/s  3:18 left",
        "Training      2%  step 2/100  loss 3.000  350 tok/s  3:16 left",
        "Succeeded   Published",
    ]


def test_programs_get_the_object_without_its_bookkeeping():
    raw = make_raw()
    assert strip_managed_fields(raw) == {**raw, "metadata": {**raw["metadata"], "managedFields": None}} | {
        "metadata": {key: value for key, value in raw["metadata"].items() if key != "managedFields"}
    }


def test_newer_operator_may_add_fields_but_not_reasons():
    newer = {**make_raw(status=SUCCEEDED), "status": {"phase": "Succeeded", "mood": "good"}}
    assert parse_job(newer).succeeded
    with pytest.raises(
        ClusterError, match=r"written by another version \(reason: .*install the version of the operator"
    ):
        parse_job({**newer, "status": {"reason": "Bored"}})


@pytest.mark.parametrize(("end", "code"), [(SUCCEEDED, 0), (FAILED, 3)])
def test_wait_exit_code_follows_run(end: Any, code: int):
    paper = PlainConsole()
    cluster = FakeClusterClient(*make_raws(None, make_training(1), make_training(2), SUSPENDED, end))
    assert wait.wait_for_all(cluster, [REF], None, FakeTime().clock, paper.console) == code
    assert paper.lines[:3] == ["support-bot Pending", "support-bot Training", "support-bot Suspended"]
    assert paper.lines[3:] == [f"support-bot {end.phase} ({end.reason}): {end.reason} it is"]


def test_wait_for_several_fails_if_one_failed():
    cluster = FakeClusterClient(*make_raws(FAILED, SUCCEEDED))
    assert wait.wait_for_all(cluster, [REF, REF], None, FakeTime().clock, PlainConsole().console) == 3


def test_wait_has_a_limit():
    time, paper = FakeTime(), PlainConsole()
    cluster = FakeClusterClient(make_raw(status=make_training(1)))
    assert wait.wait_for_all(cluster, [REF, REF], 90.0, time.clock, paper.console) == 124
    assert time.seconds == 90
    assert paper.lines[-1] == "support-bot is still Training"


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("1.5m", 90), ("2h", 7200), ("1d", 86_400)])
def test_durations(text: str, seconds: float):
    assert wait.parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "m", "5 weeks"])
def test_invalid_duration_is_rejected(text: str):
    with pytest.raises(typer.BadParameter, match="write a number and a unit"):
        wait.parse_seconds(text)


def test_unreachable_api_server_is_retried_and_reported_once():
    away = UnreachableError("nobody answers")
    notes: list[str] = []
    found = poll_job(FakeClusterClient(away, away, make_raw(status=SUCCEEDED)), REF, FakeTime().clock, notes.append)
    assert next(found).succeeded
    assert notes == ["nobody answers; retrying for 5 minutes"]


def test_api_server_unreachable_for_too_long_is_an_error():
    time = FakeTime()
    with pytest.raises(UnreachableError, match="nobody answers"):
        next(poll_job(FakeClusterClient(UnreachableError("nobody answers")), REF, time.clock, lambda _: None))
    assert UNREACHABLE_TIMEOUT_SECONDS < time.seconds < UNREACHABLE_TIMEOUT_SECONDS + 5
