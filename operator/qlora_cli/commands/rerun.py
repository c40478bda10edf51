"""`qlora rerun`: a run that has ended, once more under the same name."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.markup import escape

from qlora_api.job_ref import JobRef
from qlora_cli.cluster.client import ClusterClient, ClusterError, NotFoundError
from qlora_cli.cluster.connection import Context, JobName, Kubeconfig, Namespace, exit_on_cluster_error, open_connection
from qlora_cli.cluster.jobs import ClusterJob, get_job, parse_job
from qlora_cli.cluster.polling import Clock
from qlora_cli.display.formats import to_yaml
from qlora_cli.manifests.overrides import OverrideError, override_manifest, parse_override

DELETION_SECONDS: Final = 300.0
"""Longest wait for the former run to be gone: its pods have a minute to end, and a lost node takes longer."""
_KEPT_METADATA: Final = ("name", "namespace", "labels", "annotations")
"""What a manifest says of itself; the rest of the metadata is the API server's."""


def rerun(  # noqa: PLR0913, PLR0917 (an option each)
    name: JobName,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Train again, and delete_and_create the published result."),
    ] = False,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Change a field, such as lora.rank=8.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Also a run that has not ended: it is stopped first.")] = False,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Delete a run that has ended and create it anew; it goes on from its checkpoint, or finds what was published."""
    with exit_on_cluster_error("qlora list shows whether the run was created anew") as console:
        wanted = [*(changes or []), *(["output.ifExists=Overwrite"] if overwrite else [])]
        connection = open_connection(namespace, context, kubeconfig)
        job = get_job(connection.cluster, connection.ref(name))
        manifest = make_manifest(job, wanted)
        check_rerun(job, force=force)
        if job.succeeded and not wanted:
            console.print(f"{name} is published, and will be found so; --overwrite trains again", soft_wrap=True)
        delete_and_create(connection.cluster, job, manifest, Clock(), console)
    typer.echo(f"QLoRAJob {job.ref.namespace}/{job.ref.name} was submitted anew")


def check_rerun(job: ClusterJob, *, force: bool) -> None:
    """Refuse to stop a run that nobody said should be stopped."""
    if not (job.finished or force):
        raise ClusterError(
            f"{job.ref.name} is {job.phase}; wait for its end with qlora wait {job.ref.name}, or stop it with --force"
        )


def make_manifest(job: ClusterJob, changes: list[str]) -> dict[str, Any]:
    """Return what a user would apply to have this run again, with changes."""
    metadata = {key: job.raw["metadata"][key] for key in _KEPT_METADATA if key in job.raw["metadata"]}
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
    """Delete the former run, wait until it is gone, and create it anew; nothing is lost where that fails."""
    check_manifest(cluster, manifest)
    cluster.delete(job.ref, job.uid)
    console.print(escape(f"waiting for {job.ref.name} and its pods to be gone"), soft_wrap=True)
    wait_until_gone(cluster, job.ref, job.uid, clock)
    try:
        return parse_job(cluster.create(manifest))
    except ClusterError as error:
        raise ClusterError(
            f"{error}; the former run is deleted, and its manifest kept in {save_manifest(manifest)}"
        ) from error


def check_manifest(cluster: ClusterClient, manifest: Mapping[str, Any]) -> None:
    """Have the API server check the manifest under a name that is free, before anything is deleted."""
    name = f"{manifest['metadata']['name'][:45]}-rerun"
    cluster.create({**manifest, "metadata": {**manifest["metadata"], "name": name}}, dry_run=True)


def wait_until_gone(cluster: ClusterClient, ref: JobRef, uid: str, clock: Clock) -> None:
    """Return once this QLoRAJob is gone with its children."""
    deadline = clock.now() + DELETION_SECONDS
    while clock.now() < deadline:
        try:
            if get_job(cluster, ref).uid != uid:
                raise ClusterError(f"somebody else created QLoRAJob {ref.namespace}/{ref.name} in the meantime")
        except NotFoundError:
            return
        clock.sleep(0.5)
    raise ClusterError(
        f"{ref.name} is still being deleted after {DELETION_SECONDS / 60:.0f} minutes; see its "
        f"pods with kubectl get pods --namespace {ref.namespace} -l qlora.dev/job={ref.name}"
    )


def save_manifest(manifest: Mapping[str, Any]) -> Path:
    """Write a manifest to a file of its own, and return its path."""
    with tempfile.NamedTemporaryFile(
        "w", prefix=f"{manifest['metadata']['name']}-", suffix=".yaml", delete=False, encoding="utf-8"
    ) as file:
        file.write(to_yaml(dict(manifest)))
    return Path(file.name)
