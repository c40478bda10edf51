"""`qlora report`: shows and opens the report of a published run, from a folder, a bucket or a cluster."""

import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Final

import typer

from qlora_api.escapes import escape_line
from qlora_api.names import output_root
from qlora_api.object_names import ObjectName
from qlora_api.result import is_below
from qlora_api.units import GIB
from qlora_api.untrusted_json import InvalidJsonError, parse_object
from qlora_api.v1alpha1 import EvaluationStatus
from qlora_cli.cluster.client import ClusterError
from qlora_cli.cluster.connection import Connect, Context, Kubeconfig, Namespace, ResultName, exit_on_cluster_error
from qlora_cli.cluster.jobs import ClusterJob, get_job
from qlora_cli.console import Console, print_line
from qlora_cli.display.formats import print_data
from qlora_cli.display.result import comparison_table
from qlora_cli.errors import exit_error_without_remedy
from qlora_cli.local.output_store import MAX_REPORT_BYTES, OutputError, open_output_store
from qlora_cli.local.published_results import check_listed, check_listed_file, find_result, is_result
from qlora_cli.options import OutputFormat, OutputOption, S3Endpoint
from qlora_cli.uris import to_display_path, using_path

MAX_BYTES: Final = 2 * GIB
"""Files of a report together: evaluation.jsonl has the texts of all held-out rows."""
REPORT_PAGE = "report.html"
REPORT_JSON = "report.json"


def report(  # noqa: PLR0913, PLR0917 (an option each)
    name: ResultName,
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
    """Show and open the report of a published run; from a bucket it is downloaded, with the local S3 credentials."""
    with exit_on_cluster_error() as console:
        try:
            found = _locate(name, s3_endpoint, console, Connect(namespace, context, kubeconfig))
            if output is not OutputFormat.TABLE:
                print_data(read_report_json(found, s3_endpoint), output)
                return
            if found.folder.startswith("file://") and to is None:
                page = _find_page(Path(to_display_path(found.folder)))
                check_listed_file(found.digests, f"report/{REPORT_PAGE}", page)
            else:
                target = to or _default_folder(found.name)
                page = download_report(found.folder, target, s3_endpoint, found.digests) / REPORT_PAGE
        except OutputError as error:
            exit_error_without_remedy(console, None, escape_line(str(error)))
    show_report(found.evaluation, page)
    if sys.stdout.isatty() if show is None else show:
        typer.launch(page.absolute().as_uri())


def _default_folder(name: str) -> Path:
    """Return the folder for a report in the working folder, which may be somebody else's: a link is refused."""
    folder = Path(f"{name}-report")
    if folder.is_symlink():
        raise OutputError(f"{folder} is a link; remove it, or name a folder with --to")
    return folder


def _find_page(folder: Path) -> Path:
    """Return the page in a local report; a link is refused, since whatever it points to would be opened."""
    page = folder / REPORT_PAGE
    if page.is_symlink() or not page.is_file():
        raise OutputError(f"{page} is no file; copy the result again, links included as files")
    return page


@dataclass(frozen=True)
class Report:
    """Where a report is, and the comparison in it."""

    name: str
    folder: str
    """URI."""
    evaluation: EvaluationStatus | None
    digests: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of the files that the manifest lists; none if a cluster names the report."""


def _locate(name: str, endpoint: str | None, console: Console, connect: Connect) -> Report:
    """Return the report of a result in a folder or a bucket, or of a QLoRAJob."""
    if is_result(name):
        result = find_result(name, endpoint, lambda text: print_line(console, text))
        return Report(result.report.job, f"{result.uri}/report", result.report.evaluation, result.digests)
    connection = connect.open()
    job = get_job(connection.cluster, connection.ref(name))
    return Report(name, find_report(job), job.status.evaluation)


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


def read_report_json(report: Report, endpoint: str | None) -> object:
    """Return the content of report.json."""
    folder = report.folder
    with open_output_store(folder, endpoint) as files:
        content = files.read(REPORT_JSON, MAX_REPORT_BYTES)
    if report.digests:
        check_listed(report.digests, f"report/{REPORT_JSON}", content)
    try:
        return parse_object(content, MAX_REPORT_BYTES)
    except InvalidJsonError as error:
        raise OutputError(f"{folder}/{REPORT_JSON} {error}; give another result") from error


def download_report(folder: str, target: Path, endpoint: str | None, digests: Mapping[str, str] | None = None) -> Path:
    """Download the files of the report, and return their folder; with digests those only, and only if all match."""
    with open_output_store(folder, endpoint) as files, tempfile.TemporaryDirectory() as temporary:
        downloads = Path(temporary)
        entries = [entry for entry in files.list() if not digests or f"report/{entry.path}" in digests]
        if sum(entry.size for entry in entries) > MAX_BYTES:
            raise OutputError(f"{folder} has more than {MAX_BYTES:,} bytes, which no report has; look at it there")
        for entry in entries:
            file = entry.path.below(downloads)
            files.download(entry.path, file)
            if digests:
                check_listed_file(digests, f"report/{entry.path}", file)
        if not (downloads / REPORT_PAGE).is_file():
            raise OutputError(f"{folder} has no {REPORT_PAGE}; was it deleted?")
        _check_no_links(target, [entry.path for entry in entries])
        with using_path(target, "--to"):
            shutil.copytree(downloads, target, dirs_exist_ok=True)
    return target


def _check_no_links(target: Path, names: Iterable[ObjectName]) -> None:
    """Raise OutputError if a file would be written through a link that is in the folder: somebody else may own that."""
    for name in names:
        for path in (name.below(target), *name.below(target).parents):
            if path == target:
                break
            if path.is_symlink():
                raise OutputError(f"--to: {path} is a link; remove it, or choose another folder")


def show_report(evaluation: EvaluationStatus | None, page: Path) -> None:
    """Print the comparison of base and adapter, and where the report is."""
    console = Console()
    if evaluation:
        console.print(comparison_table(evaluation))
    print_line(console, str(page), "report  ", "bold")
