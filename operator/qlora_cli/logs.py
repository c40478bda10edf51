"""`qlora logs`: what the pods of a run write, all at once; and what remains when they are gone."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.markup import escape

from qlora_cli.cluster import Cluster
from qlora_cli.connection import Context, JobName, Kubeconfig, Namespace, open_connection, reporting_errors
from qlora_cli.jobs import get_job
from qlora_cli.loglines import LogLine, read_line
from qlora_cli.options import S3Endpoint
from qlora_cli.pods import PREPARATION, TrainerPod, find_pods, latest_attempt
from qlora_cli.polling import Clock, look
from qlora_cli.remains import show_remains
from qlora_cli.streams import Streams
from qlora_operator.values import JobRef

STYLES: Final = ("cyan", "green", "magenta", "yellow", "blue", "red")


def logs(  # noqa: PLR0913, PLR0917 (an option each)
    name: JobName,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Stay, through further attempts, until the run has ended.")
    ] = False,
    attempt: Annotated[
        int | None, typer.Option(min=PREPARATION, help="Number of an attempt; 0: the preparation. Default: the latest.")
    ] = None,
    node: Annotated[
        int | None, typer.Option(min=0, help="Only the pod of this node, counted from 0; default: all.")
    ] = None,
    tail: Annotated[int | None, typer.Option(min=0, help="Only so many of the last lines of each pod.")] = None,
    timestamps: Annotated[bool, typer.Option("--timestamps", help="Show when each line was written.")] = False,
    prefix: Annotated[bool, typer.Option(help="Put the pod before each line.")] = True,
    raw: Annotated[
        bool | None,
        typer.Option("--raw/--text", help="Lines as they are, or written for people; default: text on a terminal."),
    ] = None,
    s3_endpoint: S3Endpoint = None,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Print the logs of all pods of an attempt, each line with its pod and process, or what remains of them."""
    query = {"timestamps": "true"} if timestamps else {}
    query |= {"tailLines": str(tail)} if tail is not None else {}
    with reporting_errors() as console:
        connection = open_connection(namespace, context, kubeconfig)
        cluster, ref = connection.cluster, connection.ref(name)
        printer = Printer(prefix=prefix, raw=not sys.stdout.isatty() if raw is None else raw)
        choice = Choice(attempt, node)
        if follow:
            found = follow_logs(cluster, ref, choice, query, printer, Clock())
        else:
            found = print_logs(cluster, ref, choice, query, printer)
        if not found:
            show_remains(get_job(cluster, ref), attempt, s3_endpoint, console)


@dataclass(frozen=True)
class Choice:
    """Which pods are meant: of one attempt, or of the latest and those after it; of one node, or of all."""

    attempt: int | None = None
    node: int | None = None

    def of(self, pods: Sequence[TrainerPod], since: int) -> list[TrainerPod]:
        """Return the pods that are meant; attempts before `since` only where one is asked for."""
        return [
            pod
            for pod in pods
            if (pod.attempt >= since if self.attempt is None else pod.attempt == self.attempt)
            and self.node in {None, pod.node}
        ]


class Printer:
    """Writes lines of several pods to standard output, each pod in a colour of its own, and each process of a pod."""

    def __init__(self, *, prefix: bool, raw: bool, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        self._prefix = prefix
        self._raw = raw
        self._styles: dict[str, str] = {}

    def show(self, pod: TrainerPod, line: str) -> None:
        """Write one line."""
        rank, text = LogLine(None, line) if self._raw else read_line(line)
        label = pod.label if rank is None else f"{pod.label}/{rank}"
        style = self._styles.setdefault(label, STYLES[len(self._styles) % len(STYLES)])
        before = f"[{style}]{escape(label)} |[/] " if self._prefix else ""
        self._console.print(before + escape(text), soft_wrap=True)

    @staticmethod
    def note(text: str) -> None:
        """Write a sentence of the command's own."""
        typer.echo(text, err=True)


def print_logs(cluster: Cluster, ref: JobRef, choice: Choice, query: Mapping[str, str], printer: Printer) -> bool:
    """Print what was written until now, pod after pod; return whether there was a pod."""
    get_job(cluster, ref)  # a name that is mistyped is an error, and not a run without pods
    found = find_pods(cluster, ref)
    pods = choice.of(found, latest_attempt(found))
    for pod in pods:
        if not pod.started:
            printer.note(f"{pod.label} has written nothing yet: its container has not started")
            continue
        for line in cluster.log(ref.namespace, pod.name, query):
            printer.show(pod, line)
    return bool(pods)


def follow_logs(  # noqa: PLR0913, PLR0917 (what to print, how, and when)
    cluster: Cluster, ref: JobRef, choice: Choice, query: Mapping[str, str], printer: Printer, clock: Clock
) -> bool:
    """Print lines as they come, of this attempt and of those that follow; return whether there was a pod."""
    streams = Streams(cluster, ref.namespace, {**query, "follow": "true"})
    first: int | None = None
    for job in look(cluster, ref, clock, printer.note):
        found = find_pods(cluster, ref)
        if first is None and found:
            first = latest_attempt(found)
        streams.open(pod for pod in choice.of(found, first or PREPARATION) if pod.started)
        ended = job.finished and not streams.running
        streams.drain(printer.show)
        if ended:
            break
    return streams.opened
