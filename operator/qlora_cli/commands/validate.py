"""`qlora validate`: checks manifests offline with the rules of the API server and the operator."""

from typing import Annotated

import typer

from qlora_api.escapes import escape_line
from qlora_cli.console import echo
from qlora_cli.manifests.loader import ManifestError, is_qlorajob, parse_manifest
from qlora_cli.manifests.yaml_documents import YamlError, read_documents
from qlora_planner.validation import CLUSTER_RULES


def validate(
    files: Annotated[list[str], typer.Argument(help="Manifests; - reads standard input.", metavar="FILE...")],
) -> None:
    """Check manifests offline; other kinds in a file are ignored."""
    results = [validate_file(file) for file in files]
    if not all(results):
        raise typer.Exit(1)


def validate_file(file: str) -> bool:
    """Print a line for each valid QLoRAJob and each problem; return whether the file is valid."""
    try:
        jobs = [document for document in read_documents(file) if is_qlorajob(document)]
    except (YamlError, OSError, UnicodeDecodeError) as error:
        echo(describe_read_error(file, error), err=True)
        return False
    if not jobs:
        echo(f"{escape_line(file)}: contains no QLoRAJob", err=True)
    valid = True
    for job in jobs:
        try:
            manifest = parse_manifest(job, CLUSTER_RULES)
            echo(f"{job.position_of(())}: QLoRAJob {manifest.metadata.name} is valid")
        except ManifestError as error:
            echo(str(error), err=True)
            valid = False
    return valid and bool(jobs)


def describe_read_error(file: str, error: Exception) -> str:
    """Return why a file could not be read."""
    if isinstance(error, YamlError):
        return str(error)
    return f"{escape_line(file)}: {error.strerror if isinstance(error, OSError) else 'not UTF-8'}"
