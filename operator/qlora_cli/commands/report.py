"""`qlora report`: downloads and opens the report of a published run."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from qlora_api.escapes import escape_line
from qlora_api.names import output_root
from qlora_api.result import is_below
from qlora_cli.cluster.client import ClusterError
from qlora_cli.cluster.connection import Context, JobName, Kubeconfig, Namespace, exit_on_cluster_error, open_connection
from qlora_cli.cluster.jobs import ClusterJob, get_job
from qlora_cli.console import Console, print_line
from qlora_cli.display.formats import print_data
from qlora_cli.display.result import comparison_table
from qlora_cli.errors import exit_error_without_remedy
from qlora_cli.local.output_store import MAX_READ_BYTES, OutputError, open_output_store
from qlora_cli.options import OutputFormat, OutputOption, S3Endpoint

REPORT_PAGE = "report.html"
REPORT_JSON = "report.json"


def report(  # noqa: PLR0913, PLR0917 (an option each)
    name: JobName,
    to: Annotated[
        Path | None, typer.Option("--to", metavar="FOLDER", help="Folder for the files; default: ./NAME-report.")
    ] = None,
    show: Annotated[
        bool | None, typer.Option("--open/--no-open", help="Open the report in a browser; default: on a terminal.")
    ] = None,
    s3_endpoint: S3Endpoint = None,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Download the report of a published run, with the local S3 credentials, and open it."""
    with exit_on_cluster_error() as console:
        connection = open_connection(namespace, context, kubeconfig)
        job = get_job(connection.cluster, connection.ref(name))
        folder = find_report(job)
        try:
            if output is not OutputFormat.TABLE:
                print_data(read_report_json(folder, s3_endpoint), output)
                return
            page = download_report(folder, to or Path(f"{name}-report"), s3_endpoint) / REPORT_PAGE
        except OutputError as error:
            exit_error_without_remedy(console, None, escape_line(str(error)))
    show_report(job, page)
    if sys.stdout.isatty() if show is None else show:
        typer.launch(str(page.resolve()))


def find_report(job: ClusterJob) -> str:
    """Return the URI of the report's folder.

    Raises:
        ClusterError: The run has not published a report, or its status has something else than a URI of one.

    """
    published = job.status.output.report if job.status.output else None
    if published is None:
        raise ClusterError(f"{job.ref.name} is {job.phase} and has no report: {job.explanation}")
    root = output_root(job.spec().output.uri, job.ref.name)
    if not is_below(published, root):
        raise ClusterError(
            f"status.output.report of {job.ref.name} is {published!r}, and not the URI of a report below {root}; find "
            "the report there"
        )
    return published.rpartition("/")[0]


def read_report_json(folder: str, endpoint: str | None) -> object:
    """Return the content of report.json."""
    with open_output_store(folder, endpoint) as files:
        return json.loads(files.read(REPORT_JSON, MAX_READ_BYTES))


def download_report(folder: str, target: Path, endpoint: str | None) -> Path:
    """Download every file of the report, and return their folder."""
    with open_output_store(folder, endpoint) as files:
        for entry in files.list():
            files.download(entry.path, entry.path.below(target))
    if not (target / REPORT_PAGE).is_file():
        raise OutputError(f"{folder} has no {REPORT_PAGE}; was it deleted?")
    return target


def show_report(job: ClusterJob, page: Path) -> None:
    """Print the comparison of base and adapter, and where the report is."""
    console = Console()
    if job.status.evaluation:
        console.print(comparison_table(job.status.evaluation))
    print_line(console, str(page), "report  ", "bold")
