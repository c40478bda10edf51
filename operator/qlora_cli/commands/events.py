"""`qlora events`: the Events of a run, its Jobs and its pods, in one list."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.console import Group
from rich.text import Text

from qlora_api.escapes import escape_line
from qlora_api.job_ref import JobRef
from qlora_api.names import KIND
from qlora_cli.cluster.client import ClusterClient, KubeObject
from qlora_cli.cluster.connection import Context, JobName, Kubeconfig, Namespace, exit_on_cluster_error, open_connection
from qlora_cli.cluster.jobs import get_job, strip_managed_fields
from qlora_cli.cluster.polling import Clock, poll_job
from qlora_cli.console import Console, print_line
from qlora_cli.display.formats import format_age, print_data, render_columns
from qlora_cli.options import OutputFormat, OutputOption


@dataclass(frozen=True)
class Event:
    """A Kubernetes Event; repeated ones are aggregated into one."""

    uid: str
    time: datetime
    type: str
    subject: str
    reason: str
    message: str
    raw: KubeObject


def events(  # noqa: PLR0913, PLR0917 (an option each)
    name: JobName,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Keep running and show new Events until the run ends.")
    ] = False,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Show the Events of a run, its Jobs and its pods, newest last; Kubernetes keeps Events for an hour."""
    with exit_on_cluster_error() as console:
        connection = open_connection(namespace, context, kubeconfig)
        ref = connection.ref(name)
        if follow:
            follow_events(connection.cluster, ref, console, Clock())
            return
        get_job(connection.cluster, ref)  # a mistyped name is an error, not an empty list
        found = find_events(connection.cluster, ref)
    if output is not OutputFormat.TABLE:
        items = [strip_managed_fields(event.raw) for event in found]
        print_data({"apiVersion": "v1", "kind": "List", "items": items}, output)
    else:
        Console().print(tabulate(found, datetime.now(UTC)), soft_wrap=True)


def find_events(cluster: ClusterClient, ref: JobRef) -> list[Event]:
    """Return the Events of a QLoRAJob and its children, newest last."""
    found = (
        parse_event(raw) for raw in cluster.events(ref.namespace) if belongs_to_job(raw["involvedObject"], ref.name)
    )
    return sorted(found, key=lambda event: (event.time, event.uid))


def belongs_to_job(subject: KubeObject, job: str) -> bool:
    """Return whether an Event's subject is the QLoRAJob or, by its name, one of its Jobs or pods.

    The match is by name because Events outlive Jobs and pods.
    """
    kind, name = subject.get("kind"), subject.get("name", "")
    if kind == KIND:
        return bool(name == job)
    child = rf"{re.escape(job)}-(?:prepare|prep[1-9][0-9]*|[1-9][0-9]*)"
    patterns = {"Job": child, "Workload": rf"job-{child}-[0-9a-f]+", "Pod": rf"{child}-[0-9]+-[a-z0-9]{{5}}"}
    return kind in patterns and bool(re.fullmatch(patterns[kind], name))


def parse_event(raw: KubeObject) -> Event:
    """Parse an Event written with the core/v1 or the events.k8s.io/v1 API."""
    subject = raw["involvedObject"]
    series = (raw.get("series") or {}).get("lastObservedTime")
    time = series or raw.get("lastTimestamp") or raw.get("eventTime") or raw["metadata"]["creationTimestamp"]
    return Event(
        uid=raw["metadata"]["uid"],
        time=datetime.fromisoformat(time),
        type=raw.get("type", ""),
        subject=f"{subject['kind']} {subject['name']}",
        reason=raw.get("reason", ""),
        message=raw.get("message", ""),
        raw=raw,
    )


def tabulate(found: Iterable[Event], now: datetime) -> Group:
    """Return a table with the columns of `kubectl get events`."""
    return render_columns(
        ("AGE", "TYPE", "OBJECT", "REASON", "MESSAGE"),
        [
            (
                format_age(event.time, now),
                Text(escape_line(event.type), "yellow" if event.type == "Warning" else ""),
                *(event.subject, event.reason, event.message),
            )
            for event in found
        ],
    )


def follow_events(cluster: ClusterClient, ref: JobRef, console: Console, clock: Clock) -> None:
    """Print each new Event until the run has ended."""
    shown: set[str] = set()
    out = Console()
    for job in poll_job(cluster, ref, clock, lambda text: print_line(console, text)):
        for event in new_events(find_events(cluster, ref), shown):
            line = f"{event.time:%H:%M:%S}  {event.type:<7}  {event.subject}  {event.reason}  {event.message}"
            print_line(out, line)
        if job.finished:
            return


def new_events(found: Iterable[Event], shown: set[str]) -> Iterator[Event]:
    """Yield the Events that are not in `shown`, and add them to it."""
    for event in found:
        if event.uid not in shown:
            shown.add(event.uid)
            yield event
