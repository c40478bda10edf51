"""`qlora list`: lists the QLoRAJobs of a cluster."""

from collections.abc import Sequence
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Final

import typer
from rich.console import Group
from rich.text import Text

from qlora_api.names import Phase
from qlora_cli.cluster.connection import Context, Kubeconfig, Namespace, exit_on_cluster_error, open_connection
from qlora_cli.cluster.jobs import ClusterJob, parse_job, strip_managed_fields
from qlora_cli.console import Console, echo
from qlora_cli.display.formats import PHASE_STYLES, Cell, format_age, print_data, render_columns
from qlora_cli.options import OutputFormat


class ListFormat(StrEnum):
    """Values of --output."""

    TABLE = "table"
    WIDE = "wide"
    JSON = "json"
    YAML = "yaml"


_HEADINGS: Final = ("NAME", "PHASE", "PROGRESS", "ETA", "LOSS", "GPUS", "ATTEMPT", "REASON", "AGE")
_WIDE_HEADINGS: Final = ("MODEL", "STEP", "TOK/S", "GPU-HOURS", "ADAPTER", "MESSAGE")


def list_jobs(  # noqa: PLR0913, PLR0917 (an option each)
    all_namespaces: Annotated[
        bool, typer.Option("--all-namespaces", "-A", help="List QLoRAJobs of all namespaces.")
    ] = False,
    phases: Annotated[
        list[Phase] | None, typer.Option("--phase", help="Only QLoRAJobs in this phase; may be given several times.")
    ] = None,
    selector: Annotated[str, typer.Option("--selector", "-l", help="Label selector.")] = "",
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
    output: Annotated[ListFormat, typer.Option("--output", "-o", help="Output format.")] = ListFormat.TABLE,
) -> None:
    """List QLoRAJobs, newest last."""
    with exit_on_cluster_error():
        connection = open_connection(namespace, context, kubeconfig)
        found = connection.cluster.list_jobs("" if all_namespaces else connection.namespace, selector)
        jobs = filter_by_phase([parse_job(item) for item in found], phases or list(Phase))
    if output in {ListFormat.JSON, ListFormat.YAML}:
        items = [strip_managed_fields(job.raw) for job in jobs]
        print_data({"apiVersion": "v1", "kind": "List", "items": items}, OutputFormat(output.value))
    elif jobs:
        wide = output is ListFormat.WIDE
        Console().print(tabulate(jobs, datetime.now(UTC), namespaces=all_namespaces, wide=wide), soft_wrap=True)
    else:
        scope = "any namespace" if all_namespaces else f"namespace {connection.namespace}"
        echo(f"no QLoRAJobs found in {scope}", err=True)


def filter_by_phase(jobs: Sequence[ClusterJob], phases: Sequence[Phase]) -> list[ClusterJob]:
    """Return the jobs in these phases, newest last."""
    return sorted((job for job in jobs if job.phase in phases), key=lambda job: (job.created_at, job.ref))


def tabulate(jobs: Sequence[ClusterJob], now: datetime, *, namespaces: bool, wide: bool = False) -> Group:
    """Return a table with the columns of `kubectl get qlj`, and the attempt; `wide` as there with `-o wide`."""
    headings = (*_HEADINGS, *(_WIDE_HEADINGS if wide else ()))
    rows = [(*_row(job, now), *(_wide_row(job) if wide else ())) for job in jobs]
    if namespaces:
        return render_columns(
            ("NAMESPACE", *headings), [(job.ref.namespace, *row) for job, row in zip(jobs, rows, strict=True)]
        )
    return render_columns(headings, rows)


def _row(job: ClusterJob, now: datetime) -> tuple[Cell, ...]:
    status = job.status
    return (
        job.ref.name,
        Text(job.phase, PHASE_STYLES.get(job.phase, "")),
        *(status.progress or "", status.eta or "", status.loss or ""),
        *("" if value is None else str(value) for value in (status.gpus, status.attempt)),
        status.reason or "",
        format_age(job.created_at, now),
    )


def _wide_row(job: ClusterJob) -> tuple[Cell, ...]:
    status, model = job.status, job.raw["spec"].get("model") or {}
    adapter = status.output and status.output.adapter
    gpu_hours = status.usage and status.usage.gpu_hours
    shown = (model.get("uri"), status.step, status.tokens_per_second, gpu_hours, adapter, status.summary)
    return tuple(value or "" for value in shown)
