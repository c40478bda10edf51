"""`qlora rerun`: runs a finished QLoRAJob again under the same name."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from qlora_api.escapes import shell_command
from qlora_api.job_ref import JobRef
from qlora_api.names import JOB_LABEL
from qlora_cli.cluster.client import ClusterClient, ClusterError, NotFoundError
from qlora_cli.cluster.connection import Context, JobName, Kubeconfig, Namespace, exit_on_cluster_error, open_connection
from qlora_cli.cluster.jobs import ClusterJob, get_job, parse_job
from qlora_cli.cluster.polling import Clock
from qlora_cli.console import Console, echo, print_line
from qlora_cli.display.formats import to_yaml
from qlora_cli.manifests.overrides import OverrideError, override_manifest, parse_override

DELETION_SECONDS: Final = 300.0
"""Longest wait for the deletion of the previous run; pods have a grace period of a minute, a lost node takes longer."""
_MANIFEST_METADATA: Final = ("name", "namespace", "labels", "annotations")
"""Metadata that a manifest sets; the rest is set by the API server."""


def rerun(  # noqa: PLR0913, PLR0917 (an option each)
    name: JobName,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Train again, and replace the published result."),
    ] = False,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Change a field, such as lora.rank=8.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Also rerun a run that has not ended; it is stopped first.")
    ] = False,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Delete a finished run and create it again; it resumes from its checkpoint, or reuses a published result."""
    with exit_on_cluster_error("qlora list shows whether the run was created again") as console:
        all_changes = [*(changes or []), *(["output.ifExists=Overwrite"] if overwrite else [])]
        connection = open_connection(namespace, context, kubeconfig)
        job = get_job(connection.cluster, connection.ref(name))
        manifest = make_manifest(job, all_changes)
        check_rerun(job, force=force)
        if job.succeeded and not all_changes:
            print_line(console, f"{name} is already published and will be reused; --overwrite trains again")
        delete_and_create(connection.cluster, job, manifest, Clock(), console)
    echo(f"QLoRAJob {job.ref.namespace}/{job.ref.name} was submitted again")


def check_rerun(job: ClusterJob, *, force: bool) -> None:
    """Raise ClusterError if the run has not ended, unless --force is set."""
    if not (job.finished or force):
        raise ClusterError(
            f"{job.ref.name} is {job.phase}; wait for its end with {shell_command('qlora', 'wait', job.ref.name)}, or "
            "stop it with --force"
        )


def make_manifest(job: ClusterJob, changes: list[str]) -> dict[str, Any]:
    """Return the manifest of a run, without the fields of the API server, with the changes applied."""
    metadata = {key: job.raw["metadata"][key] for key in _MANIFEST_METADATA if key in job.raw["metadata"]}
    manifest = {
        "apiVersion": job.raw["apiVersion"], "kind": job.raw["kind"], "metadata": metadata, "spec": job.raw["spec"],
    }  # fmt: skip
    try:
        return override_manifest(manifest, map(parse_override, changes))
    except OverrideError as error:
        raise ClusterError(str(error)) from error


def delete_and_create(
    cluster: ClusterClient, job: ClusterJob, manifest: Mapping[str, Any], clock: Clock, console: Console
) -> ClusterJob:
    """Delete the previous run, wait until it is gone, and create it again; if that fails, its manifest is saved."""
    check_manifest(cluster, manifest)
    cluster.delete(job.ref, job.uid)
    print_line(console, f"waiting for {job.ref.name} and its pods to be deleted")
    wait_until_gone(cluster, job.ref, job.uid, clock)
    try:
        return parse_job(cluster.create(manifest))
    except ClusterError as error:
        raise ClusterError(
            f"{error}; the previous run is deleted, and its manifest was saved to {save_manifest(manifest)}"
        ) from error


def check_manifest(cluster: ClusterClient, manifest: Mapping[str, Any]) -> None:
    """Validate the manifest in a dry run under an unused name, before anything is deleted."""
    name = f"{manifest['metadata']['name'][:45]}-rerun"
    cluster.create({**manifest, "metadata": {**manifest["metadata"], "name": name}}, dry_run=True)


def wait_until_gone(cluster: ClusterClient, ref: JobRef, uid: str, clock: Clock) -> None:
    """Return once this QLoRAJob and its children are deleted.

    Raises:
        ClusterError: Somebody else created a QLoRAJob with this name, or the deletion takes too long.

    """
    deadline = clock.now() + DELETION_SECONDS
    while clock.now() < deadline:
        try:
            if get_job(cluster, ref).uid != uid:
                raise ClusterError(f"somebody else created QLoRAJob {ref.namespace}/{ref.name} in the meantime")
        except NotFoundError:
            return
        clock.sleep(0.5)
    raise ClusterError(
        f"{ref.name} is still being deleted after {DELETION_SECONDS / 60:.0f} minutes; see its pods with "
        + shell_command("kubectl", "get", "pods", "--namespace", ref.namespace, "-l", f"{JOB_LABEL}={ref.name}")
    )


def save_manifest(manifest: Mapping[str, Any]) -> Path:
    """Write a manifest to a new temporary file, and return its path."""
    with tempfile.NamedTemporaryFile(
        "w", prefix=f"{Path(manifest['metadata']['name']).name}-", suffix=".yaml", delete=False, encoding="utf-8"
    ) as file:
        file.write(to_yaml(dict(manifest)))
    return Path(file.name)
