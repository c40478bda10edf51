"""`qlora submit`: validates manifests offline, then creates them in the cluster."""

from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer

from qlora_api.escapes import shell_command
from qlora_cli.cluster.client import AlreadyExistsError, ClusterClient, ClusterError
from qlora_cli.cluster.connection import (
    Connection,
    Context,
    Kubeconfig,
    Namespace,
    exit_on_cluster_error,
    open_connection,
)
from qlora_cli.cluster.jobs import ClusterJob, parse_job, strip_managed_fields
from qlora_cli.cluster.polling import Clock
from qlora_cli.commands.status import watch_job
from qlora_cli.commands.wait import wait_for_all
from qlora_cli.console import Console, echo
from qlora_cli.display.formats import print_data
from qlora_cli.errors import exit_error_without_remedy
from qlora_cli.manifests.job_files import read_jobs, read_manifests
from qlora_cli.manifests.loader import ManifestError, is_qlorajob, parse_manifest
from qlora_cli.manifests.local_paths import local_fields
from qlora_cli.manifests.overrides import Override, OverrideError, parse_override
from qlora_cli.manifests.yaml_documents import Document, YamlError
from qlora_cli.options import OutputFormat, OutputOption
from qlora_planner.validation import CLUSTER_RULES


def submit(  # noqa: PLR0913, PLR0917 (an option each)
    files: Annotated[list[str], typer.Argument(help="Manifests; - reads standard input.", metavar="FILE...")],
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Change a field, such as lora.rank=8.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Let the API server validate them, but create nothing.")
    ] = False,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Keep running and show changes until the end; exit code as of wait.")
    ] = False,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Create QLoRAJobs; all are validated before the first is created. Other kinds in a file are ignored."""
    with exit_on_cluster_error("what was submitted keeps running: qlora list") as console:
        documents = load_documents(files, changes or [], console)
        connection = open_connection(namespace, context, kubeconfig)
        manifests = [with_namespace(document.value, namespace, connection) for document in documents]
        jobs = [create_job(connection.cluster, manifest, dry_run=dry_run) for manifest in manifests]
        show_created(jobs, output, dry_run=dry_run)
        if watch and not dry_run:
            follow(connection.cluster, jobs, console)


def load_documents(files: list[str], changes: list[str], console: Console) -> list[Document]:
    """Return every QLoRAJob of the files with the changes applied, or exit with every problem."""
    return _check(load(read_jobs, files, changes, console), files, console)


def load_manifests(files: list[str], changes: list[str], console: Console) -> list[Document]:
    """Return every QLoRAJob, checked in the same way, and every QLoRAClass of the files."""
    documents = load(read_manifests, files, changes, console)
    _check([document for document in documents if is_qlorajob(document)], files, console)
    return documents


def load(
    read: Callable[[str, list[Override]], list[Document]], files: list[str], changes: list[str], console: Console
) -> list[Document]:
    """Read the files with the changes applied, or exit with what is wrong."""
    try:
        overrides = [parse_override(change) for change in changes]
        return [document for file in files for document in read(file, overrides)]
    except (OverrideError, YamlError) as error:
        exit_error_without_remedy(console, None, str(error))


def _check(documents: list[Document], files: list[str], console: Console) -> list[Document]:
    problems = list(find_problems(documents))
    if problems and any(local_fields(document.value) for document in documents):
        problems.append(f"to train with local files, on this machine: {shell_command('qlora', 'run', files[0])}")
    if problems:
        exit_error_without_remedy(console, None, "\n".join(problems))
    return documents


def find_problems(documents: list[Document]) -> Iterator[str]:
    """Yield the problems of the manifests, as `qlora validate` prints them."""
    for document in documents:
        try:
            parse_manifest(document, CLUSTER_RULES)
        except ManifestError as error:
            yield str(error)


def with_namespace(manifest: dict[str, Any], requested: str | None, connection: Connection) -> dict[str, Any]:
    """Return the manifest with its namespace: its own, or the connection's.

    Raises:
        ClusterError: The manifest's namespace is not that of --namespace.

    """
    own = manifest["metadata"].get("namespace")
    if requested and own and requested != own:
        name = manifest["metadata"]["name"]
        raise ClusterError(
            f"QLoRAJob {name} has namespace {own}, but --namespace is {requested}; leave out one of them"
        )
    return {**manifest, "metadata": {**manifest["metadata"], "namespace": own or connection.namespace}}


def create_job(cluster: ClusterClient, manifest: dict[str, Any], *, dry_run: bool) -> ClusterJob:
    """Create one QLoRAJob; if the name is taken, the error says what to do."""
    try:
        return parse_job(cluster.create(manifest, dry_run=dry_run))
    except AlreadyExistsError as error:
        name = manifest["metadata"]["name"]
        raise AlreadyExistsError(
            f"QLoRAJob {manifest['metadata']['namespace']}/{name} already exists; choose another name, or run it "
            f"again with {shell_command('qlora', 'rerun', name)}"
        ) from error


def show_created(jobs: list[ClusterJob], output: OutputFormat, *, dry_run: bool) -> None:
    """Print what was created; as JSON or YAML with all fields."""
    if output is not OutputFormat.TABLE:
        items = [strip_managed_fields(job.raw) for job in jobs]
        print_data(items[0] if len(items) == 1 else {"apiVersion": "v1", "kind": "List", "items": items}, output)
        return
    for job in jobs:
        result = "would be accepted" if dry_run else "was submitted"
        echo(f"QLoRAJob {job.ref.namespace}/{job.ref.name} {result}")


def follow(cluster: ClusterClient, jobs: list[ClusterJob], console: Console) -> None:
    """Show one job live, or the phases of several, and exit with the code of `qlora wait`."""
    if len(jobs) == 1:
        watch_job(cluster, jobs[0].ref, console, Clock())
    raise typer.Exit(wait_for_all(cluster, [job.ref for job in jobs], None, Clock(), console))
