"""The `qlora` app; each command is a module of qlora_cli.commands."""

import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from qlora_api import __version__
from qlora_cli.commands.chat import chat
from qlora_cli.commands.events import events
from qlora_cli.commands.init import init
from qlora_cli.commands.list import list_jobs
from qlora_cli.commands.logs import logs
from qlora_cli.commands.merge import merge
from qlora_cli.commands.plan import plan
from qlora_cli.commands.render import render
from qlora_cli.commands.report import report
from qlora_cli.commands.rerun import rerun
from qlora_cli.commands.run import run
from qlora_cli.commands.serve_snippet import serve_snippet
from qlora_cli.commands.status import status
from qlora_cli.commands.submit import submit
from qlora_cli.commands.suspend import resume, suspend
from qlora_cli.commands.usage import usage
from qlora_cli.commands.validate import validate
from qlora_cli.commands.wait import wait
from qlora_cli.console import echo, escape_log_messages

app = typer.Typer(
    name="qlora",
    help="QLoRA fine-tuning from a QLoRAJob manifest.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)
app.command()(init)
app.command()(validate)
app.command()(plan)
app.command()(render)
app.command()(run)
app.command()(merge)
app.command()(chat)
app.command()(submit)
app.command("list")(list_jobs)
app.command()(status)
app.command()(wait)
app.command()(logs)
app.command()(events)
app.command()(suspend)
app.command()(resume)
app.command()(rerun)
app.command()(usage)
app.command()(report)
app.command()(serve_snippet)


def _show_version(value: bool) -> None:
    if value:
        echo(f"qlora {__version__}")
        raise typer.Exit


@app.callback()
def main(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """QLoRA fine-tuning from a QLoRAJob manifest."""


def run_app() -> None:
    """Run under the name that the user typed: `qlora`, or `kubectl qlora`."""
    escape_log_messages()
    try:
        app(prog_name="kubectl qlora" if Path(sys.argv[0]).stem == "kubectl-qlora" else "qlora")
    except Exception:
        echo(traceback.format_exc(), err=True, nl=False)
        sys.exit(1)


if __name__ == "__main__":
    run_app()
