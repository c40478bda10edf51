"""`qlora suspend` and `qlora resume`: a run that rests, and goes on from its checkpoint."""

from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from qlora_api.job_ref import JobRef
from qlora_api.names import Phase
from qlora_cli.cluster.client import ClusterClient, ClusterError
from qlora_cli.cluster.connection import Context, JobName, Kubeconfig, Namespace, exit_on_cluster_error, open_connection
from qlora_cli.cluster.jobs import ClusterJob, get_job, parse_job
from qlora_cli.cluster.pods import is_alive
from qlora_cli.cluster.polling import Clock
from qlora_cli.commands.wait import TIMED_OUT_EXIT_CODE, TimedOutError, Timeout, wait_until


def suspend(  # noqa: PLR0913, PLR0917 (an option each)
    name: JobName,
    wait: Annotated[bool, typer.Option("--wait", help="Stay until no pod runs any more.")] = False,
    timeout: Timeout = None,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Let a run write a checkpoint and give back its GPUs; resume goes on from there."""
    with exit_on_cluster_error() as console:
        connection = open_connection(namespace, context, kubeconfig)
        job = set_suspended(connection.cluster, connection.ref(name), True)
        if wait:
            job = _wait_until_stopped(connection.cluster, job.ref, timeout, console)
    rests = "is suspended" if job.phase is Phase.SUSPENDED else "will be suspended after the step under way"
    typer.echo(f"QLoRAJob {job.ref.namespace}/{job.ref.name} {rests}")


def resume(name: JobName, namespace: Namespace = None, context: Context = None, kubeconfig: Kubeconfig = None) -> None:
    """Let a suspended run go on from its last checkpoint."""
    with exit_on_cluster_error():
        connection = open_connection(namespace, context, kubeconfig)
        job = set_suspended(connection.cluster, connection.ref(name), False)
    typer.echo(f"QLoRAJob {job.ref.namespace}/{job.ref.name} goes on")


def set_suspended(cluster: ClusterClient, ref: JobRef, wanted: bool) -> ClusterJob:
    """Write spec.suspend, unless the run has ended."""
    job = get_job(cluster, ref)
    if job.finished:
        raise ClusterError(f"QLoRAJob {ref.namespace}/{ref.name} has {job.phase.lower()}; qlora rerun starts it anew")
    return parse_job(cluster.patch(ref, {"spec": {"suspend": wanted}}))


def _wait_until_stopped(cluster: ClusterClient, ref: JobRef, timeout: float | None, console: Console) -> ClusterJob:
    clock = Clock()
    deadline = None if timeout is None else clock.now() + timeout
    try:
        return wait_until(
            lambda job: is_stopped(job, cluster),
            cluster,
            ref,
            deadline,
            clock,
            lambda text: console.print(escape(text)),
        )
    except TimedOutError as error:
        console.print(escape(str(error)), soft_wrap=True)
        raise typer.Exit(TIMED_OUT_EXIT_CODE) from None


def is_stopped(job: ClusterJob, cluster: ClusterClient) -> bool:
    """Whether nothing runs: it came to its end first, or is told to rest and its pods have done what they had to."""
    return job.finished or (job.phase is Phase.SUSPENDED and not any(map(is_alive, cluster.pods(job.ref))))
