"""`qlora usage`: shows what runs held of GPUs, for what, what it cost, what was lost, and what was saved."""

import csv
import io
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from pydantic import ValidationError
from rich.console import Group

from qlora_api.escapes import escape_line
from qlora_api.gpu_prices import GpuPrices
from qlora_api.v1alpha1.usage import PARTS
from qlora_cli.cluster.connection import Context, Kubeconfig, Namespace, exit_on_cluster_error, open_connection
from qlora_cli.cluster.jobs import ClusterJob, parse_job
from qlora_cli.console import Console, echo, print_line
from qlora_cli.display.formats import print_data, render_columns
from qlora_cli.gpu_time import (
    LABEL,
    MONTH,
    NAMESPACE,
    RUN,
    GpuTime,
    Period,
    Row,
    Savings,
    format_cost,
    next_month,
    savings_of,
    tabulate_gpu_time,
    total_of,
)
from qlora_cli.manifests.yaml_documents import YamlError, parse_documents, read_text
from qlora_cli.options import OutputFormat

SECONDS_PER_HOUR: Final = 3600
_FORMULA: Final = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""What a formula begins with, also in full width; tabs and line breaks, which spreadsheets skip, are escaped."""


class UsageFormat(StrEnum):
    """Values of --output."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"


def usage(  # noqa: PLR0913, PLR0917 (an option each)
    by: Annotated[
        list[str] | None,
        typer.Option(
            "--by",
            metavar="KEY",
            help="run (default), namespace, month, or label=KEY for a label of QLoRAJobs; may be given several times.",
        ),
    ] = None,
    month: Annotated[str | None, typer.Option(metavar="YYYY-MM", help="Only this month (UTC).")] = None,
    since: Annotated[
        str | None, typer.Option(metavar="DATE", help="Only from this day on, as 2026-11-30 (UTC).")
    ] = None,
    until: Annotated[
        str | None, typer.Option(metavar="DATE", help="Only up to this day, itself included (UTC).")
    ] = None,
    prices: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="YAML file with `currency` and `gpuPrices`, as in the chart's `usage`; default: the recorded prices.",
        ),
    ] = None,
    all_namespaces: Annotated[
        bool, typer.Option("--all-namespaces", "-A", help="QLoRAJobs of all namespaces.")
    ] = False,
    selector: Annotated[str, typer.Option("--selector", "-l", help="Label selector.")] = "",
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
    output: Annotated[UsageFormat, typer.Option("--output", "-o", help="Output format.")] = UsageFormat.TABLE,
) -> None:
    """Show what runs held of GPUs, for what, and what it cost: by run, team or month."""
    keys, period, now = read_keys(by), read_period(month, since, until), datetime.now(UTC)
    given = read_prices(prices) if prices else None
    with exit_on_cluster_error():
        connection = open_connection(namespace, context, kubeconfig)
        found = connection.cluster.list_jobs("" if all_namespaces else connection.namespace, selector)
        jobs = [parse_job(item) for item in found]
    keys = [NAMESPACE, *keys] if all_namespaces and keys == [RUN] else keys
    show(tabulate_gpu_time(jobs, keys, period, now, given), keys, jobs, period, output)


def read_keys(by: Sequence[str] | None) -> list[str]:
    """Return the keys of --by."""
    keys = list(dict.fromkeys(by or [RUN]))
    for key in keys:
        if key not in {RUN, NAMESPACE, MONTH} and not (key.startswith(LABEL) and key != LABEL):
            raise typer.BadParameter(
                f"{escape_line(key)!r} is no key: use run, namespace, month, or label=KEY, such as label=team",
                param_hint="--by",
            )
    return keys


def read_period(month: str | None, since: str | None, until: str | None) -> Period:
    """Return the period of the options."""
    if month is not None and (since or until):
        raise typer.BadParameter("--month is a period of its own: leave out --since and --until", param_hint="--month")
    if month is not None:
        first = _read_date(f"{month}-01", "--month", "a month, as 2026-11")
        return Period(first, next_month(first))
    period = Period()
    if since is not None:
        period = Period(_read_date(since, "--since", "a day, as 2026-11-30"), period.until)
    if until is not None:
        end = _read_date(until, "--until", "a day, as 2026-11-30").replace(
            hour=23, minute=59, second=59, microsecond=999_999
        )
        period = Period(period.since, end)
    if period.since >= period.until:
        raise typer.BadParameter("it is before --since: swap them", param_hint="--until")
    return period


def _read_date(text: str, option: str, example: str) -> datetime:
    try:
        return datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC)
    except ValueError:
        raise typer.BadParameter(f"{escape_line(text)!r} is no date: write {example}", param_hint=option) from None


def read_prices(path: Path) -> GpuPrices:
    """Return the prices of a file."""
    try:
        return GpuPrices.model_validate(_read_value(path))
    except YamlError as error:
        raise typer.BadParameter(escape_line(str(error)), param_hint="--prices") from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the file"
        raise typer.BadParameter(
            f"{escape_line(str(path))}: {escape_line(field)}: {first['msg']}: write `currency: USD` and "
            '`gpuPrices: {NVIDIA-A10: "1.20"}`',
            param_hint="--prices",
        ) from None


def _read_value(path: Path) -> object:
    documents = parse_documents(read_text(str(path)), str(path))
    if len(documents) > 1 or any(document.duplicates for document in documents):
        raise YamlError(f"{path}: has several documents, or a key twice; keep one of them")
    return documents[0].value if documents else None


def show(
    rows: Sequence[Row], keys: Sequence[str], jobs: Sequence[ClusterJob], period: Period, output: UsageFormat
) -> None:
    """Print the rows, and what was lost and saved."""
    savings, unrecorded = savings_of(jobs, period), count_unrecorded(jobs)
    if output is UsageFormat.CSV:
        echo(to_csv(rows, keys), nl=False)
    elif output is UsageFormat.JSON:
        print_data(to_document(rows, keys, savings, unrecorded), OutputFormat.JSON)
    else:
        console = Console()
        if rows:
            console.print(render_rows(rows, keys), soft_wrap=True)
        else:
            echo("no run held a GPU in this period", err=True)
        for line in describe_rest(total_of(rows), savings):
            print_line(console, line)
    if unrecorded and output is not UsageFormat.JSON:
        echo(f"runs of an earlier version, without recorded GPU time: {unrecorded}", err=True)


def count_unrecorded(jobs: Sequence[ClusterJob]) -> int:
    """Return how many runs with GPUs an earlier version recorded, without their GPU time."""
    return sum(
        bool(job.status.plan and job.status.plan.gpus_per_node)
        and any(attempt.started_at and attempt.usage is None for attempt in job.status.attempts)
        for job in jobs
    )


def render_rows(rows: Sequence[Row], keys: Sequence[str]) -> Group:
    """Return a table in GPU-hours, with the sum below."""
    total = total_of(rows)
    shown = [part for part in PARTS if total.parts[part]]
    priced = bool(total.costs)
    names = [key.removeprefix(LABEL).upper() for key in keys]
    figures = ["RUNS", "GPU-HOURS", *(part.upper() for part in shown), "LOST", *(["COST"] if priced else [])]
    lines = [(row.keys, row.time) for row in rows]
    if len(rows) > 1:
        lines.append((("total", *("" for _ in keys[1:])), total))
    return render_columns(
        [*names, *figures], [(*values, *_cells(time, shown, priced=priced)) for values, time in lines]
    )


def _cells(time: GpuTime, shown: Sequence[str], *, priced: bool) -> Iterator[str]:
    yield str(len(time.runs))
    yield hours(time.held)
    yield from (hours(time.parts[part]) for part in shown)
    yield hours(sum(time.lost.values()))
    if priced:
        yield format_cost(time.costs)


def hours(seconds: float) -> str:
    """Format GPU-seconds as GPU-hours."""
    return f"{seconds / SECONDS_PER_HOUR:.2f}"


def describe_rest(total: GpuTime, savings: Savings) -> Iterator[str]:
    """Yield what was lost by reason, what was saved, and what has no price."""
    for reason, seconds in total.lost_by_reason():
        yield f"lost   {hours(seconds)} GPU-hours: {reason}"
    if savings.reused:
        known = f"{hours(savings.reused_gpu_seconds)} GPU-hours: " if savings.reused_gpu_seconds else ""
        unknown = f", of unknown GPU time: {savings.reused_unknown}" if savings.reused_unknown else ""
        yield f"saved  {known}results found published: {savings.reused}{unknown}"
    if savings.refused:
        reasons = ", ".join(f"{count} {reason}" for reason, count in savings.refused.most_common())
        yield f"saved  GPUs that refused runs never held, for an unknown time: {savings.refused_gpus} ({reasons})"
    if total.costs and total.unpriced:
        yield f"{hours(total.unpriced)} GPU-hours have no price"


def to_document(rows: Sequence[Row], keys: Sequence[str], savings: Savings, unrecorded: int) -> dict[str, Any]:
    """Return the report as JSON."""
    total = total_of(rows)
    return {
        "rows": [{**dict(zip(keys, row.keys, strict=True)), **_figures(row.time)} for row in rows],
        "total": _figures(total),
        "lostByReason": {reason.value: _hours(seconds) for reason, seconds in total.lost_by_reason()},
        "saved": {
            "resultsFound": savings.reused,
            "gpuHours": _hours(savings.reused_gpu_seconds),
            "resultsOfUnknownGpuTime": savings.reused_unknown,
            "refusedRuns": {reason.value: count for reason, count in savings.refused.most_common()},
            "refusedGpus": savings.refused_gpus,
        },
        "runsWithoutRecordedUsage": unrecorded,
    }


def _figures(time: GpuTime) -> dict[str, Any]:
    return {
        "runs": len(time.runs),
        "gpuHours": _hours(time.held),
        **{part: _hours(time.parts[part]) for part in PARTS},
        "lost": _hours(sum(time.lost.values())),
        "costs": {currency: f"{amount:.2f}" for currency, amount in sorted(time.costs.items())},
        "gpuHoursWithoutPrice": _hours(time.unpriced),
    }


def _hours(seconds: float) -> float:
    return round(seconds / SECONDS_PER_HOUR, 4)


def to_csv(rows: Sequence[Row], keys: Sequence[str]) -> str:
    """Return the rows as CSV (RFC 4180), in GPU-hours."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        [*(_as_text(key.removeprefix(LABEL)) for key in keys), "runs", "gpu_hours", *PARTS, "lost", "cost", "currency"]
    )
    for row in rows:
        figures = [f"{seconds / SECONDS_PER_HOUR:.4f}" for seconds in _csv_seconds(row.time)]
        costs, currencies = (
            " + ".join(f"{value:.2f}" for _, value in sorted(row.time.costs.items())),
            sorted(row.time.costs),
        )
        names = [_as_text(escape_line(value)) for value in row.keys]
        writer.writerow([*names, len(row.time.runs), *figures, costs, " + ".join(currencies)])
    return text.getvalue()


def _as_text(cell: str) -> str:
    """Return a cell that a spreadsheet takes for text: it runs a formula, which a label or a name may be (OWASP)."""
    return f"'{cell}" if cell.startswith(_FORMULA) else cell


def _csv_seconds(time: GpuTime) -> Iterator[float]:
    yield time.held
    yield from (time.parts[part] for part in PARTS)
    yield sum(time.lost.values())
