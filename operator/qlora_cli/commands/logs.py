"""`qlora logs`: the logs of all pods of a run, live, or archived in the output once the pods are gone."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import typer

from qlora_api.job_ref import JobRef
from qlora_api.logs.files import PREPARE_ATTEMPT
from qlora_cli.cluster.client import ClusterClient, ClusterError
from qlora_cli.cluster.connection import Context, JobName, Kubeconfig, Namespace, exit_on_cluster_error, open_connection
from qlora_cli.cluster.jobs import ClusterJob, get_job
from qlora_cli.cluster.pods import TrainerPod, find_pods, latest_attempt
from qlora_cli.cluster.polling import Clock, poll_job
from qlora_cli.options import S3Endpoint
from qlora_cli.podlogs.archived import LogQuery, MissingLogs, latest_started_attempt, show_archived_logs
from qlora_cli.podlogs.lines import LogPrinter, LogStreams


def logs(  # noqa: PLR0913, PLR0917 (an option each)
    name: JobName,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Stream the logs, also of later attempts, until the run ends.")
    ] = False,
    attempt: Annotated[
        int | None,
        typer.Option(min=PREPARE_ATTEMPT, help="Number of an attempt; 0: preparation. Default: the latest."),
    ] = None,
    node: Annotated[
        int | None, typer.Option(min=0, help="Only the pod of this node, counted from 0; default: all.")
    ] = None,
    tail: Annotated[int | None, typer.Option(min=0, help="Number of lines to show from the end of each log.")] = None,
    timestamps: Annotated[bool, typer.Option("--timestamps", help="Show the timestamp of each line.")] = False,
    prefix: Annotated[bool, typer.Option(help="Prefix each line with its pod.")] = True,
    raw: Annotated[
        bool | None,
        typer.Option("--raw/--text", help="Raw lines, or formatted as text; default: text on a terminal, else raw."),
    ] = None,
    s3_endpoint: S3Endpoint = None,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Print the logs of all pods of an attempt; once the pods are gone, those archived in the output."""
    query = {"timestamps": "true"} if timestamps else {}
    query |= {"tailLines": str(tail)} if tail is not None else {}
    with exit_on_cluster_error() as console:
        connection = open_connection(namespace, context, kubeconfig)
        cluster, ref = connection.cluster, connection.ref(name)
        printer = LogPrinter(prefix=prefix, raw=not sys.stdout.isatty() if raw is None else raw)
        selection = PodSelection(attempt, node)
        if follow:
            missing = follow_logs(cluster, ref, selection, query, printer, Clock())
        else:
            missing = print_logs(cluster, ref, selection, query, printer)
        if missing is not None:
            archive_query = LogQuery(attempt, tail, timestamps, s3_endpoint)
            show_archived_logs(get_job(cluster, ref), missing, archive_query, printer, console)


@dataclass(frozen=True)
class PodSelection:
    """Which pods to show: of one attempt, or of the latest and later ones; of one node, or of all."""

    attempt: int | None = None
    node: int | None = None

    def select(self, pods: Sequence[TrainerPod], since: int) -> list[TrainerPod]:
        """Return the selected pods; if no attempt is selected, those of attempts from `since` on."""
        return [
            pod
            for pod in pods
            if (pod.attempt >= since if self.attempt is None else pod.attempt == self.attempt)
            and self.node in {None, pod.node}
        ]

    def missing_logs(self, latest: int) -> MissingLogs:
        """Return the selection as missing logs, if none of its pods exists any more."""
        nodes = None if self.node is None else frozenset({self.node})
        return MissingLogs(latest if self.attempt is None else self.attempt, nodes)


def latest_known_attempt(job: ClusterJob, pods: Sequence[TrainerPod]) -> int:
    """Return the latest attempt that has or had pods."""
    return max(latest_attempt(pods), latest_started_attempt(job))


def print_logs(
    cluster: ClusterClient, ref: JobRef, selection: PodSelection, query: Mapping[str, str], printer: LogPrinter
) -> MissingLogs | None:
    """Print the logs so far, pod by pod; return the logs that could not be read from pods."""
    job = get_job(cluster, ref)  # a mistyped name is an error, not a run without pods
    found = find_pods(cluster, ref)
    latest = latest_known_attempt(job, found)
    pods = selection.select(found, latest)
    lost = {pod.node for pod in pods if not print_pod(cluster, ref, pod, query, printer)}
    if not pods:
        return selection.missing_logs(latest)
    return MissingLogs(pods[-1].attempt, frozenset(lost)) if lost else None


def print_pod(
    cluster: ClusterClient, ref: JobRef, pod: TrainerPod, query: Mapping[str, str], printer: LogPrinter
) -> bool:
    """Print the log of a pod; return whether it could be read, which is impossible once its node is lost."""
    if not pod.started:
        printer.note(f"{pod.label} has no log yet: its container has not started")
        return True
    try:
        for line in cluster.log(ref.namespace, pod.name, query):
            printer.show(pod, line)
    except ClusterError as error:
        printer.note(f"cannot read the log of {pod.label}: {error}")
        return False
    return True


def follow_logs(  # noqa: PLR0913, PLR0917 (what to print, how, and when)
    cluster: ClusterClient,
    ref: JobRef,
    selection: PodSelection,
    query: Mapping[str, str],
    printer: LogPrinter,
    clock: Clock,
) -> MissingLogs | None:
    """Stream the logs of this attempt and of later ones; return the selected logs if there was no pod to follow."""
    streams = LogStreams(cluster, ref.namespace, {**query, "follow": "true"})
    first: int | None = None
    latest = PREPARE_ATTEMPT
    for job in poll_job(cluster, ref, clock, printer.note):
        found = find_pods(cluster, ref)
        latest = latest_known_attempt(job, found)
        if first is None and found:
            first = latest
        streams.open(pod for pod in selection.select(found, first or PREPARE_ATTEMPT) if pod.started)
        ended = job.finished and not streams.running
        streams.drain(printer.show)
        if ended:
            break
    return None if streams.opened else selection.missing_logs(latest)
