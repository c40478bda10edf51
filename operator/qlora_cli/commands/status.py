"""`qlora status`: shows the state of a run, once or live."""

from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.live import Live

from qlora_api.escapes import shell_command
from qlora_api.job_ref import JobRef
from qlora_cli.cluster.client import ClusterClient
from qlora_cli.cluster.connection import (
    Connection,
    Context,
    JobName,
    Kubeconfig,
    Namespace,
    exit_on_cluster_error,
    open_connection,
)
from qlora_cli.cluster.jobs import ClusterJob, get_job, strip_managed_fields
from qlora_cli.cluster.polling import Clock, poll_job
from qlora_cli.console import Console, print_line
from qlora_cli.display.dashboard import LossHistory, render_dashboard
from qlora_cli.display.formats import print_data
from qlora_cli.display.progress import format_progress
from qlora_cli.options import OutputFormat, OutputOption


def status(  # noqa: PLR0913, PLR0917 (an option each)
    name: JobName,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Keep running and show changes until the run ends.")
    ] = False,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Show the state of a run, why, and the fix if it needs one; with --watch live progress, time left and loss."""
    with exit_on_cluster_error(
        f"the run keeps running: {shell_command('qlora', 'status', '--watch', name)}"
    ) as console:
        connection = open_connection(namespace, context, kubeconfig)
        if watch:
            watch_job(connection.cluster, connection.ref(name), console, Clock())
        show_once(connection, name, output)


def show_once(connection: Connection, name: str, output: OutputFormat) -> None:
    """Print a QLoRAJob as a dashboard, or as JSON or YAML."""
    job = get_job(connection.cluster, connection.ref(name))
    if output is not OutputFormat.TABLE:
        print_data(strip_managed_fields(job.raw), output)
    else:
        Console().print(render_dashboard(job, LossHistory(), datetime.now(UTC), details=True), soft_wrap=True)


def watch_job(cluster: ClusterClient, ref: JobRef, console: Console, clock: Clock) -> None:
    """Show a QLoRAJob until it has ended: live on a terminal, else one line per change."""
    if console.is_terminal:
        _watch_live(cluster, ref, console, clock)
    else:
        _watch_lines(cluster, ref, console, clock)


def _watch_live(cluster: ClusterClient, ref: JobRef, console: Console, clock: Clock) -> None:
    history = LossHistory()
    with Live(console=console, auto_refresh=False, transient=True) as live:
        for job in poll_job(cluster, ref, clock, lambda text: print_line(console, text)):
            if job.finished:
                return
            history = history.extend(job)
            live.update(render_dashboard(job, history, datetime.now(UTC), details=False), refresh=True)


def _watch_lines(cluster: ClusterClient, ref: JobRef, console: Console, clock: Clock) -> None:
    last = ""
    for job in poll_job(cluster, ref, clock, lambda text: print_line(console, text)):
        if (line := describe_job(job)) != last:
            print_line(console, line)
            last = line
        if job.finished:
            return


def describe_job(job: ClusterJob) -> str:
    """Return phase and progress on one line."""
    report = job.status.last_report
    shown = format_progress(report) if report and not job.finished else job.status.reason or ""
    return f"{job.phase:<10}  {shown}".rstrip()
