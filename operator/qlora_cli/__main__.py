"""The `qlora` app; qlora_cli.command_table lists its commands."""

import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from qlora_api import __version__
from qlora_cli.command_table import LazyGroup
from qlora_cli.console import echo, escape_log_messages

app = typer.Typer(
    name="qlora",
    cls=LazyGroup,
    help="QLoRA fine-tuning from a QLoRAJob manifest.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)


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
