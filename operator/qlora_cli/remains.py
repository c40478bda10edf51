"""What is left of a run whose pods are gone: the last word of each attempt, and the stacks of those that hung."""

from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape

from qlora_api.v1alpha1 import Attempt
from qlora_cli.jobs import ClusterJob
from qlora_cli.results import OutputError, open_output

HANGS = "hangs"
"""Folder of a result with the stacks of processes that gave no sign of life."""


def show_remains(job: ClusterJob, attempt: int | None, s3_endpoint: str | None, console: Console) -> None:
    """Say that the logs are gone, and print what the status and the output have of them."""
    attempts = [found for found in job.status.attempts if attempt in {None, found.number}]
    console.print(escape(explain(job, bool(attempts))), soft_wrap=True)
    out = Console(highlight=False)
    for found in attempts:
        out.print(escape(describe_attempt(found)), soft_wrap=True)
    if job.status.output and any(found.reason and "stacks" in found.message for found in attempts):
        _show_stacks(job.status.output.prefix, attempt, s3_endpoint, console, out)


def explain(job: ClusterJob, ran: bool) -> str:
    """Say why there is no log."""
    if not ran:
        return f"{job.ref.name} is {job.phase} and has no pods: {job.why}"
    return (
        f"the pods of {job.ref.name} are gone, and their logs with them: spec.ttl removes both after the end, and so "
        "does a deletion; a log collector of the cluster may have them. Their last words:"
    )


def describe_attempt(attempt: Attempt) -> str:
    """Return the last word of an attempt."""
    where = f" on {attempt.node}" if attempt.node else ""
    return f"attempt {attempt.number}{where}: {attempt.reason or 'under way'}  {attempt.message}".rstrip()


def _show_stacks(prefix: str, attempt: int | None, endpoint: str | None, console: Console, out: Console) -> None:
    try:
        for path, text in read_stacks(prefix, attempt, endpoint):
            out.print(escape(f"{path}\n{text}"), soft_wrap=True)
    except OutputError as error:
        console.print(escape(f"stacks are in {prefix}/{HANGS}/, and {error}"), soft_wrap=True)


def read_stacks(prefix: str, attempt: int | None, endpoint: str | None) -> Iterator[tuple[str, str]]:
    """Yield the files of stacks, of one attempt or of all."""
    wanted = f"{HANGS}/attempt-{attempt}-" if attempt is not None else f"{HANGS}/"
    with open_output(prefix, endpoint) as output:
        for entry in output.list(HANGS):
            if entry.path.startswith(wanted):
                yield f"{prefix}/{entry.path}", output.read(entry.path).decode(errors="replace")
