"""`qlora usage` on what a cluster answers."""

import csv
import io
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import pytest
import typer
from typer.testing import CliRunner

from qlora_api.gpu_prices import GpuPrices
from qlora_api.lost_gpu_time import lost_gpu_seconds
from qlora_api.names import Phase
from qlora_api.reasons import Reason
from qlora_api.v1alpha1 import Attempt, AttemptUsage, EarlierAttempts, GpuUsage, HeldPod, QLoRAJobStatus, RunUsage
from qlora_api.v1alpha1.usage import PARTS, sum_usage
from qlora_cli.__main__ import app
from qlora_cli.cluster.connection import Connection
from qlora_cli.cluster.jobs import ClusterJob, parse_job
from qlora_cli.commands import usage as command
from qlora_cli.commands.usage import read_keys, read_period, read_prices
from qlora_cli.gpu_time import MONTH, NAMESPACE, RUN, Period, savings_of, tabulate_gpu_time, total_of
from tests.make import make_plan_status, merge
from tests.unit.cli.fake_cluster import FakeClusterClient, make_raw

HOUR: Final = 3600
NOV: Final = datetime(2026, 11, 1, tzinfo=UTC)
NOW: Final = datetime(2026, 12, 15, tzinfo=UTC)
PLAN: Final = make_plan_status().model_copy(update={"gpus_per_node": 2, "gpu_product": "NVIDIA-A10"})


def usage_of(since: datetime, price: str | None = None, **hours: int) -> AttemptUsage:
    """The usage of one pod with two GPUs, in GPU-hours."""
    held = sum(hours.values()) * HOUR
    return AttemptUsage(
        gpus_per_pod=2, gpu_product="NVIDIA-A10", price=price, currency="USD" if price else None, since=since,
        until=since + timedelta(seconds=held // 2), pod_seconds=held // 2, held=held,
        **{part: value * HOUR for part, value in hours.items()},
    )  # fmt: skip


def attempt(number: int, usage: AttemptUsage | None, reason: Reason | None = Reason.PUBLISHED) -> Attempt:
    return Attempt(number=number, job=f"a-{number}", reason=reason, usage=usage)


def job(
    name: str, *attempts: Attempt, namespace: str = "ml", labels: dict[str, str] | None = None, **status: Any
) -> ClusterJob:
    known = [entry.usage for entry in attempts if entry.usage]
    facts = {
        "phase": Phase.SUCCEEDED, "reason": Reason.PUBLISHED, "plan": PLAN, "attempts": attempts,
        "usage": RunUsage(**dict(sum_usage(known))) if known else None, "finished_at": NOV + timedelta(days=5),
    }  # fmt: skip
    raw = make_raw(name, QLoRAJobStatus(**(facts | status)))
    return parse_job(merge(raw, {"metadata": {"namespace": namespace, "labels": labels or {}}}))


PARTS_SHOWN: Final = ("STARTING", "TRAINING", "EVALUATING", "REPEATED", "IDLE")
CLEAN: Final = job("clean", attempt(1, usage_of(NOV, "1.20", starting=1, training=8, evaluating=1)))
RETRIED: Final = job(
    "retried",
    attempt(1, usage_of(NOV, "1.20", starting=1, training=4, idle=1), Reason.NODE_LOST),
    attempt(2, usage_of(NOV + timedelta(days=1), "1.20", starting=2, repeated=3, training=5)),
    namespace="vision",
)
FAILED: Final = job(
    "failed",
    attempt(1, usage_of(NOV, "1.20", starting=1, training=4), Reason.NON_FINITE_LOSS),
    phase=Phase.FAILED,
    reason=Reason.NON_FINITE_LOSS,
)


def table(
    jobs: list[ClusterJob], *keys: str, period: Period | None = None, prices: GpuPrices | None = None
) -> dict[tuple[str, ...], float]:
    rows = tabulate_gpu_time(jobs, keys or (RUN,), period or Period(), NOW, prices)
    return {row.keys: round(row.time.held / HOUR, 3) for row in rows}


def test_rows_are_by_run_team_and_month() -> None:
    labeled = job("labeled", attempt(1, usage_of(NOV, training=2)), labels={"team": "search"})
    jobs = [CLEAN, RETRIED, FAILED, labeled]
    assert table(jobs) == {("clean",): 10, ("failed",): 5, ("labeled",): 2, ("retried",): 16}
    assert table(jobs, NAMESPACE) == {("ml",): 17, ("vision",): 16}
    assert table(jobs, "label=team") == {("",): 31, ("search",): 2}
    assert table(jobs, NAMESPACE, MONTH) == {("ml", "2026-11"): 17, ("vision", "2026-11"): 16}


def test_attempt_is_divided_where_a_month_ends_within_it() -> None:
    across = job("across", attempt(1, usage_of(datetime(2026, 11, 30, 18, tzinfo=UTC), training=24)))
    assert table([across], MONTH) == {("2026-11",): 12, ("2026-12",): 12}
    assert table([across], period=read_period("2026-11", None, None)) == {("across",): 12}
    assert table([across], period=read_period(None, "2026-12-01", None)) == {("across",): 12}
    assert table([across], period=read_period(None, None, "2026-10-31")) == {}


def test_months_sum_to_the_total() -> None:
    long = job("long", attempt(1, usage_of(datetime(2026, 9, 13, 7, tzinfo=UTC), starting=7, training=3600, idle=11)))
    rows = tabulate_gpu_time([long], [MONTH], Period(), NOW)
    assert len(rows) == 3
    assert total_of(rows).held == pytest.approx(3618 * HOUR)


def test_pods_that_hold_gpus_count_up_to_now() -> None:
    until = NOW - timedelta(hours=3)
    open_usage = usage_of(NOV, training=4).model_copy(update={"holding": (HeldPod(uid="a", until=until),)})
    running = job(
        "running", attempt(1, open_usage, None), phase=Phase.TRAINING, reason=Reason.TRAINING, finished_at=None
    )
    [row] = tabulate_gpu_time([running], [RUN], Period(), NOW)
    assert (row.time.held, row.time.parts["training"]) == (10 * HOUR, 10 * HOUR)


def test_waste_is_counted_once_for_its_cause() -> None:
    assert lost_gpu_seconds(CLEAN.status) == {}
    assert lost_gpu_seconds(RETRIED.status) == {Reason.NODE_LOST: 6 * HOUR}
    assert lost_gpu_seconds(FAILED.status) == {Reason.NON_FINITE_LOSS: 5 * HOUR}
    both = RETRIED.status.model_copy(update={"phase": Phase.FAILED, "reason": Reason.GATE_FAILED})
    assert lost_gpu_seconds(both) == {Reason.NODE_LOST: 6 * HOUR, Reason.GATE_FAILED: 10 * HOUR}
    assert sum(lost_gpu_seconds(both).values()) == RETRIED.status.usage.held  # type: ignore[union-attr]


def test_attempts_that_are_summed_up_count() -> None:
    earlier = EarlierAttempts(count=3, seconds=0, usage=GpuUsage(since=NOV, until=NOV, held=HOUR, training=HOUR))
    assert table([job("many", attempt(1, usage_of(NOV, training=2)), earlier_attempts=earlier)]) == {("many",): 3}


def test_costs_are_at_the_recorded_price_or_the_given_one() -> None:
    total = total_of(tabulate_gpu_time([CLEAN, RETRIED], [RUN], Period(), NOW))
    assert {name: f"{amount:.2f}" for name, amount in total.costs.items()} == {"USD": "31.20"}
    euro = GpuPrices(currency="EUR", gpu_prices={"NVIDIA-A10": "2", "*": "9"})
    total = total_of(tabulate_gpu_time([CLEAN, RETRIED], [RUN], Period(), NOW, euro))
    assert {name: f"{amount:.2f}" for name, amount in total.costs.items()} == {"EUR": "52.00"}
    unknown = GpuPrices(gpu_prices={"NVIDIA-H100": "9"})
    total = total_of(tabulate_gpu_time([CLEAN], [RUN], Period(), NOW, unknown))
    assert (total.costs, total.unpriced) == ({}, 10 * HOUR)


def test_results_found_and_refused_runs_are_savings() -> None:
    found = job("found", reason=Reason.ALREADY_PUBLISHED, usage=RunUsage(saved=7 * HOUR))
    unknown = job("unknown", reason=Reason.ALREADY_PUBLISHED)
    refused = job("refused", phase=Phase.FAILED, reason=Reason.DATASET_EMPTY)
    refused = parse_job(merge(refused.raw, {"spec": {"resources": {"nodes": 2, "gpusPerNode": 8}}}))
    savings = savings_of([found, unknown, refused, CLEAN, FAILED], Period())
    assert (savings.reused, savings.reused_gpu_seconds, savings.reused_unknown) == (2, 7 * HOUR, 1)
    assert (savings.refused, savings.refused_gpus) == ({Reason.DATASET_EMPTY: 1}, 16)
    assert savings_of([found], read_period("2026-12", None, None)).reused == 0


@pytest.mark.parametrize(
    ("month", "since", "until", "message"),
    [
        ("2026-13", None, None, "is no date"),
        ("november", None, None, "is no date"),
        ("2026-11", "2026-11-01", None, "--month is a period of its own"),
        (None, "yesterday", None, "is no date"),
        (None, "2026-12-01", "2026-11-30", "before --since"),
    ],
)
def test_period_that_is_none_is_refused(month: str | None, since: str | None, until: str | None, message: str) -> None:
    with pytest.raises(typer.BadParameter, match=message):
        read_period(month, since, until)


@pytest.mark.parametrize("key", ["team", "label=", ""])
def test_unknown_key_is_refused(key: str) -> None:
    with pytest.raises(typer.BadParameter, match="is no key"):
        read_keys([key])


@pytest.mark.parametrize(
    "text", ["gpuPrices: {A10: 1.20}", "currency: dollars", "[]", "a: [", "gpuPrices: {A10: '-1'}"]
)
def test_prices_that_cannot_be_read_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "prices.yaml").write_text(text)
    with pytest.raises(typer.BadParameter):
        read_prices(tmp_path / "prices.yaml")
    with pytest.raises(typer.BadParameter):
        read_prices(tmp_path / "missing.yaml")


# The command


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    old = job("old", attempt(1, None).model_copy(update={"started_at": NOV}))
    cluster = FakeClusterClient(*(known.raw for known in (CLEAN, RETRIED, FAILED, old)))
    monkeypatch.setattr(command, "open_connection", lambda *_: Connection(cluster, "ml"))
    return lambda *words: CliRunner().invoke(app, ["usage", *words], catch_exceptions=False)


def test_table_has_the_parts_the_sum_and_the_losses(run: Any) -> None:
    result = run("-A", "--month", "2026-11")
    assert result.exit_code == 0
    assert [line.split() for line in result.stdout.splitlines()] == [
        ["NAMESPACE", "RUN", "RUNS", "GPU-HOURS", *PARTS_SHOWN, "LOST", "COST"],
        ["ml", "clean", "1", "10.00", "1.00", "8.00", "1.00", "0.00", "0.00", "0.00", "12.00", "USD"],
        ["ml", "failed", "1", "5.00", "1.00", "4.00", "0.00", "0.00", "0.00", "5.00", "6.00", "USD"],
        ["vision", "retried", "1", "16.00", "3.00", "9.00", "0.00", "3.00", "1.00", "6.00", "19.20", "USD"],
        ["total", "3", "31.00", "5.00", "21.00", "1.00", "3.00", "1.00", "11.00", "37.20", "USD"],
        ["lost", "6.00", "GPU-hours:", "NodeLost"],
        ["lost", "5.00", "GPU-hours:", "NonFiniteLoss"],
    ]  # fmt: skip
    assert result.stderr == "runs of an earlier version, without recorded GPU time: 1\n"


def test_json_and_csv_have_the_same_figures(run: Any) -> None:
    document = json.loads(run("-o", "json").stdout)
    [clean, failed] = document["rows"]
    assert (clean["run"], clean["gpuHours"], clean["costs"]) == ("clean", 10, {"USD": "12.00"})
    assert document["lostByReason"] == {"NonFiniteLoss": 5}
    assert document["runsWithoutRecordedUsage"] == 1
    rows = list(csv.DictReader(io.StringIO(run("-o", "csv").stdout)))
    assert [row["run"] for row in rows] == ["clean", "failed"]
    assert (float(rows[1]["gpu_hours"]), rows[1]["cost"], rows[1]["currency"]) == (failed["gpuHours"], "6.00", "USD")
    assert sum(float(rows[0][part]) for part in PARTS) == float(rows[0]["gpu_hours"])


def test_label_that_holds_a_comma_and_escapes_stays_one_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    evil = job("evil", attempt(1, usage_of(NOV, training=2)), labels={"team": 'a,"b"\n\x1b[31m'})
    monkeypatch.setattr(command, "open_connection", lambda *_: Connection(FakeClusterClient(evil.raw), "ml"))
    text = CliRunner().invoke(app, ["usage", "--by", "label=team", "-o", "csv"]).stdout
    [row] = csv.DictReader(io.StringIO(text))
    assert row["team"] == 'a,"b"\\n\\x1b[31m'


def test_period_without_runs_says_so(run: Any) -> None:
    result = run("--month", "2020-01")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "no run held a GPU in this period" in result.stderr


@pytest.mark.parametrize("value", ['=HYPERLINK("http://x")', "+1", "-1+cmd|' /C calc'!A0", "@SUM(A1)", "\uff1d1"])
def test_label_that_is_a_formula_is_a_text_in_csv(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    evil = job("evil", attempt(1, usage_of(NOV, training=2)), labels={"team": value})
    monkeypatch.setattr(command, "open_connection", lambda *_: Connection(FakeClusterClient(evil.raw), "ml"))
    text = CliRunner().invoke(app, ["usage", "--by", "label=team", "-o", "csv"]).stdout
    [row] = csv.DictReader(io.StringIO(text))
    assert row["team"] == f"'{value}"
