"""`qlora rerun`: runs a finished QLoRAJob again under the same name, a failed one in place."""

import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from qlora_api.escapes import shell_command
from qlora_api.job_ref import JobRef
from qlora_api.names import JOB_LABEL, RETRY_ANNOTATION, Phase
from qlora_api.v1alpha1 import MUTABLE_FIELDS
from qlora_cli.cluster.client import ClusterClient, ClusterError, NotFoundError
from qlora_cli.cluster.connection import Context, JobName, Kubeconfig, Namespace, exit_on_cluster_error, open_connection
from qlora_cli.cluster.jobs import ClusterJob, get_job, parse_job
from qlora_cli.cluster.polling import Clock
from qlora_cli.console import Console, echo, print_line
from qlora_cli.display.formats import to_yaml
from qlora_cli.manifests.overrides import OverrideError, override_manifest, parse_override

DELETION_SECONDS: Final = 300.0
"""Longest wait for the deletion of the previous run; pods have a grace period of a minute, a lost node takes longer."""
TAKEN_UP_SECONDS: Final = 15.0
"""Longest wait for the operator to see a request; it does so at once if it is not busy."""
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
    recreate: Annotated[
        bool,
        typer.Option("--recreate", help="Also delete and create a failed run, instead of retrying it in place."),
    ] = False,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Run a finished run again: a failed one in place, from its checkpoint; another is deleted and created again."""
    with exit_on_cluster_error("qlora list shows whether the run was created again") as console:
        all_changes = [*(changes or []), *(["output.ifExists=Overwrite"] if overwrite else [])]
        connection = open_connection(namespace, context, kubeconfig)
        job = get_job(connection.cluster, connection.ref(name))
        manifest = make_manifest(job, all_changes)
        check_rerun(job, force=force)
        if not recreate and can_retry_in_place(job, manifest):
            echo(retry_in_place(connection.cluster, job, manifest, datetime.now(UTC), Clock()))
            return
        if job.succeeded and not all_changes:
            print_line(console, f"{name} is already published and will be reused; --overwrite trains again")
        delete_and_create(connection.cluster, job, manifest, Clock(), console)
    echo(f"QLoRAJob {job.ref.namespace}/{job.ref.name} was submitted again")


def can_retry_in_place(job: ClusterJob, manifest: Mapping[str, Any]) -> bool:
    """Return whether the operator can try a run again as it is: it failed, and nothing immutable changes."""
    return job.phase is Phase.FAILED and changed_blocks(job, manifest).keys() <= MUTABLE_FIELDS


def changed_blocks(job: ClusterJob, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return the blocks of the spec that differ from those of the run; None for one that is left out."""
    before, after = job.raw["spec"], manifest["spec"]
    return {name: after.get(name) for name in {*before, *after} if before.get(name) != after.get(name)}


def retry_in_place(
    cluster: ClusterClient, job: ClusterJob, manifest: Mapping[str, Any], now: datetime, clock: Clock
) -> str:
    """Ask the operator to try a failed run again, with changes of mutable fields; return what became of that."""
    request, blocks = now.isoformat(), changed_blocks(job, manifest)
    annotations = {"metadata": {"annotations": {RETRY_ANNOTATION: request}}}
    cluster.patch(job.ref, annotations | ({"spec": blocks} if blocks else {}))
    name = f"QLoRAJob {job.ref.namespace}/{job.ref.name}"
    if not wait_until_taken_up(cluster, job.ref, request, clock):
        command = shell_command("qlora", "rerun", "--recreate", job.ref.name)
        return f"{name}: no operator has seen the request yet; if the run stays Failed, use {command}"
    resumed = f"; it resumes from step {job.status.checkpoint.step}" if job.status.checkpoint else ""
    return f"{name} is tried again{resumed}"


def wait_until_taken_up(cluster: ClusterClient, ref: JobRef, request: str, clock: Clock) -> bool:
    """Return whether the operator has recorded the request in time."""
    deadline = clock.now() + TAKEN_UP_SECONDS
    while clock.now() < deadline:
        status = get_job(cluster, ref).status
        if status.retry is not None and status.retry.request == request:
            return True
        clock.sleep(0.5)
    return False


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
