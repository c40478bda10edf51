"""Options that select cluster and namespace, and how a command exits on cluster errors."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, TypeAlias

import typer

from qlora_api.escapes import escape_line
from qlora_api.job_ref import JobRef
from qlora_cli.cluster.client import ClusterClient, ClusterError
from qlora_cli.console import Console
from qlora_cli.errors import exit_error_without_remedy, exit_interrupted

Namespace: TypeAlias = Annotated[
    str | None, typer.Option("--namespace", "-n", help="Namespace; default: the one of the kubeconfig's context.")
]
Context: TypeAlias = Annotated[str | None, typer.Option(help="Context of the kubeconfig; default: the current one.")]
Kubeconfig: TypeAlias = Annotated[
    str | None, typer.Option(help="Path of the kubeconfig; default: $KUBECONFIG or ~/.kube/config.")
]


@dataclass(frozen=True)
class Connection:
    """A cluster, and the default namespace."""

    cluster: ClusterClient
    namespace: str

    def ref(self, name: str) -> JobRef:
        """Return the reference of the QLoRAJob with this name."""
        return JobRef(self.namespace, name)


def open_connection(namespace: str | None, context: str | None, kubeconfig: str | None) -> Connection:
    """Connect to the cluster of the kubeconfig with the user's permissions."""
    from qlora_cli.cluster.kube_client import connect  # noqa: PLC0415 (importing its client takes a second)

    cluster, default = connect(kubeconfig, context)
    return Connection(cluster, namespace or default)


@dataclass(frozen=True)
class Connect:
    """The options that select a cluster; connects when it is needed."""

    namespace: str | None
    context: str | None
    kubeconfig: str | None

    def open(self) -> Connection:
        """Connect."""
        return open_connection(self.namespace, self.context, self.kubeconfig)


@contextlib.contextmanager
def exit_on_cluster_error(stopped: str = "what runs in the cluster keeps running") -> Iterator[Console]:
    """Turn a ClusterError into a message and exit code 1.

    Args:
        stopped: The message after Ctrl-C: what the command leaves behind.

    Yields:
        The console for standard error.

    """
    console = Console(stderr=True)
    try:
        yield console
    except ClusterError as error:
        exit_error_without_remedy(console, None, escape_line(str(error)))
    except KeyboardInterrupt:
        exit_interrupted(console, stopped)


def complete_names(context: typer.Context, incomplete: str) -> list[str]:
    """Return the names of QLoRAJobs for shell completion; none if the cluster does not respond."""
    given = {key: context.params.get(key) for key in ("namespace", "context", "kubeconfig")}
    with contextlib.suppress(Exception):
        connection = open_connection(**given)
        found = connection.cluster.list_jobs(connection.namespace)
        return [name for item in found if (name := item["metadata"]["name"]).startswith(incomplete)]
    return []


JobName: TypeAlias = Annotated[
    str, typer.Argument(metavar="NAME", help="Name of a QLoRAJob.", autocompletion=complete_names)
]
ResultName: TypeAlias = Annotated[
    str,
    typer.Argument(
        metavar="NAME",
        help="Name of a QLoRAJob, or a folder or s3:// URI with its result.",
        autocompletion=complete_names,
    ),
]
