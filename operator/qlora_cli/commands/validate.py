"""`qlora validate`: checks manifests offline with the rules of the API server and the operator."""

from enum import StrEnum
from typing import Annotated

import typer

from qlora_cli.console import echo
from qlora_cli.display.findings import FORMATS
from qlora_cli.manifests.findings import Level, find_in_file


class FindingsFormat(StrEnum):
    """Values of --output."""

    TEXT = "text"
    JSON = "json"
    GITHUB = "github"
    SARIF = "sarif"


def validate(
    files: Annotated[list[str], typer.Argument(help="Manifests; - reads standard input.", metavar="FILE...")],
    output: Annotated[
        FindingsFormat,
        typer.Option("--output", "-o", help="Output format; github: annotations of a GitHub workflow."),
    ] = FindingsFormat.TEXT,
) -> None:
    """Check manifests offline; other kinds in a file are ignored."""
    findings = [finding for file in files for finding in find_in_file(file)]
    echo(FORMATS[output](findings), nl=False)
    if any(finding.level is Level.ERROR for finding in findings):
        raise typer.Exit(1)
