"""The CLI reference, generated from the commands."""

import typer
from typer.cli import get_docs_for_click
from typer.main import get_command

from qlora_cli.__main__ import app


def command_reference() -> str:
    """Return every command with its arguments and options, as Markdown."""
    command = get_command(app)
    context = typer.Context(command, info_name="qlora")
    return get_docs_for_click(obj=command, ctx=context, name="qlora", title="Commands of qlora").strip() + "\n"
