"""`qlora suspend` and `qlora resume`: stop a run at a checkpoint, and resume it from there."""

from typing import Annotated

import typer

from qlora_api.job_ref import JobRef
from qlora_api.names import Phase
from qlora_cli.cluster.client import ClusterClient, ClusterError
from qlora_cli.cluster.connection import Context, JobName, Kubeconfig, Namespace, exit_on_cluster_error, open_connection
from qlora_cli.cluster.jobs import ClusterJob, get_job, parse_job
from qlora_cli.cluster.pods import is_alive
from qlora_cli.cluster.polling import Clock
from qlora_cli.commands.wait import TIMED_OUT_EXIT_CODE, TimedOutError, Timeout, wait_until
from qlora_cli.console import Console, echo, print_line


def suspend(  # noqa: PLR0913, PLR0917 (an option each)
    name: JobName,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until no pod is running.")] = False,
    timeout: Timeout = None,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Let a run write a checkpoint, stop and release its GPUs; qlora resume continues from there."""
    with exit_on_cluster_error() as console:
        connection = open_connection(namespace, context, kubeconfig)
        job = set_suspended(connection.cluster, connection.ref(name), True)
        if wait:
            job = _wait_until_stopped(connection.cluster, job.ref, timeout, console)
    state = "is suspended" if job.phase is Phase.SUSPENDED else "will be suspended after the current step"
    echo(f"QLoRAJob {job.ref.namespace}/{job.ref.name} {state}")


def resume(name: JobName, namespace: Namespace = None, context: Context = None, kubeconfig: Kubeconfig = None) -> None:
    """Resume a suspended run from its last checkpoint."""
    with exit_on_cluster_error():
        connection = open_connection(namespace, context, kubeconfig)
        job = set_suspended(connection.cluster, connection.ref(name), False)
    echo(f"QLoRAJob {job.ref.namespace}/{job.ref.name} resumes")


def set_suspended(cluster: ClusterClient, ref: JobRef, value: bool) -> ClusterJob:
    """Set spec.suspend.

    Raises:
        ClusterError: The run has ended.

    """
    job = get_job(cluster, ref)
    if job.finished:
        raise ClusterError(
            f"QLoRAJob {ref.namespace}/{ref.name} has {job.phase.lower()}; use qlora rerun to run it again"
        )
    return parse_job(cluster.patch(ref, {"spec": {"suspend": value}}))


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
            lambda text: print_line(console, text),
        )
    except TimedOutError as error:
        print_line(console, str(error))
        raise typer.Exit(TIMED_OUT_EXIT_CODE) from None


def is_stopped(job: ClusterJob, cluster: ClusterClient) -> bool:
    """Return whether no pod runs: the run has ended, or it is suspended and its pods have terminated."""
    return job.finished or (job.phase is Phase.SUSPENDED and not any(map(is_alive, cluster.pods(job.ref))))
