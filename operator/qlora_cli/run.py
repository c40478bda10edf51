"""`qlora run`: a manifest, run on this computer."""

import signal
from enum import StrEnum
from types import FrameType
from typing import Annotated, Never

import typer
from rich.console import Console
from rich.markup import escape

from qlora_api.names import GUIDANCE, Reason
from qlora_api.report import LastWord
from qlora_api.runconfig import Platform, S3Config
from qlora_cli.documents import YamlError, read_documents
from qlora_cli.local import NoGpuError, NoTrainerError, load_trainer, run_locally
from qlora_cli.manifests import JobManifest, ManifestError, is_qlorajob, parse_manifest
from qlora_cli.outcome import show_outcome
from qlora_cli.overrides import Override, OverrideError, override, parse_override
from qlora_cli.screen import open_screen
from qlora_cli.uris import to_uri
from qlora_cli.validate import describe_read_error
from qlora_operator.rules import ON_A_COMPUTER

STOPPED = 130
"""The exit code of a shell's command that was interrupted."""


class Output(StrEnum):
    """How the result is printed."""

    TABLE = "table"
    JSON = "json"


def run(  # noqa: PLR0913, PLR0917 (an option each)
    file: Annotated[str, typer.Argument(help="A manifest with one QLoRAJob; - reads standard input.", metavar="FILE")],
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PATH=VALUE", help="Change a field, such as lora.rank=8 or output.uri=./out."),
    ] = None,
    hub_mirror: Annotated[
        str | None, typer.Option(help="Folder or URI with a synchronised hub cache; then no hub is asked.")
    ] = None,
    hub_endpoint: Annotated[str | None, typer.Option(help="URL of the model hub, instead of the public one.")] = None,
    s3_endpoint: Annotated[str | None, typer.Option(help="URL of an S3-compatible server, instead of AWS.")] = None,
    output: Annotated[Output, typer.Option("--output", "-o", help="How the result is printed.")] = Output.TABLE,
) -> None:
    """Prepare, train, evaluate and publish on this computer; credentials come from the environment."""
    console = Console(stderr=True, highlight=False)
    manifest = load_manifest(file, changes or [], console)
    platform = Platform(
        s3=S3Config(endpoint=s3_endpoint),
        hub_endpoint=hub_endpoint,
        hub_mirror=to_uri(hub_mirror) if hub_mirror else None,
    )
    word = run_watched(manifest, platform, console)
    if output is Output.JSON:
        typer.echo(word.model_dump_json(by_alias=True, exclude_none=True, indent=2))
    else:
        show_outcome(word, Console(highlight=False))


def load_manifest(file: str, changes: list[str], console: Console) -> JobManifest:
    """Return the one QLoRAJob of a file with the changes applied, or end with the reasons."""
    try:
        overrides = [parse_override(change) for change in changes]
        return parse_single(file, overrides)
    except (OverrideError, YamlError, ManifestError) as error:
        fail(console, Reason.INVALID_SPEC, str(error))
    except (OSError, UnicodeDecodeError) as error:
        fail(console, Reason.INVALID_SPEC, describe_read_error(file, error))


def parse_single(file: str, overrides: list[Override]) -> JobManifest:
    """Return the one QLoRAJob of a file."""
    jobs = [document for document in read_documents(file) if is_qlorajob(document)]
    if len(jobs) != 1:
        raise YamlError(f"{file}: has {len(jobs)} QLoRAJobs; give a file with one")
    return parse_manifest(override(jobs[0], overrides), ON_A_COMPUTER)


def run_watched(manifest: JobManifest, platform: Platform, console: Console) -> LastWord:
    """Run with progress on the console, and turn what a person can act on into an exit code."""
    # Imported here, because it is the trainer's: `qlora validate` works without it.
    from qlora_trainer.errors import explain  # noqa: PLC0415

    signal.signal(signal.SIGTERM, _interrupt)
    try:
        trainer = load_trainer()
        with open_screen(console) as screen:
            return run_locally(manifest, platform, trainer, screen)
    except KeyboardInterrupt:
        end_stopped(console, "nothing was published")
    except (NoGpuError, NoTrainerError) as error:
        fail(console, Reason.ACCELERATOR_MISSING if isinstance(error, NoGpuError) else None, str(error))
    except Exception as error:
        known = explain(error)
        if known.reason is Reason.INTERRUPTED:
            end_stopped(console, f"step {known.step} is done; the same command goes on from its checkpoint")
        if known.reason is Reason.TRAINER_ERROR:
            raise  # a bug of ours: its traceback is what a report needs
        fail(console, known.reason, known.message)


def end_stopped(console: Console, state: str) -> Never:
    """Say where a stopped run stands, and end as a shell expects it."""
    console.print(f"[yellow]stopped;[/] {state}", soft_wrap=True)
    raise typer.Exit(STOPPED)


def _interrupt(_number: int, _frame: FrameType | None) -> Never:
    raise KeyboardInterrupt


def fail(console: Console, reason: Reason | None, message: str) -> Never:
    """Say what is wrong and what to do about it, and end with exit code 1."""
    console.print(f"[bold red]error:[/] {f'[bold]{reason}[/]' if reason else ''}", soft_wrap=True)
    console.print(escape(message), soft_wrap=True)
    if reason in GUIDANCE and reason not in {Reason.INVALID_SPEC, Reason.ACCELERATOR_MISSING}:
        console.print(f"[bold]what to do:[/] {escape(GUIDANCE[reason].remedy)}", soft_wrap=True)
    raise typer.Exit(1)
