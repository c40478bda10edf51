"""`qlora run`: runs a manifest on the local machine."""

from typing import Annotated

import typer

from qlora_api.reasons import Reason
from qlora_api.report import TerminationMessage
from qlora_api.runconfig import Platform
from qlora_cli.console import Console
from qlora_cli.display.formats import print_data
from qlora_cli.display.progress import open_screen
from qlora_cli.display.result import show_result
from qlora_cli.errors import exit_error, exit_on_error
from qlora_cli.local.runner import load_trainer, run_locally
from qlora_cli.manifests.job_files import read_single_job
from qlora_cli.manifests.loader import JobManifest, ManifestError, parse_manifest
from qlora_cli.manifests.overrides import OverrideError, parse_override
from qlora_cli.manifests.yaml_documents import YamlError
from qlora_cli.options import HubEndpoint, HubMirror, OutputFormat, OutputOption, S3Endpoint, make_platform
from qlora_planner.validation import LOCAL_RULES


def run(  # noqa: PLR0913, PLR0917 (an option each)
    file: Annotated[str, typer.Argument(help="A manifest with one QLoRAJob; - reads standard input.", metavar="FILE")],
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PATH=VALUE", help="Change a field, such as lora.rank=8 or output.uri=./out."),
    ] = None,
    hub_mirror: HubMirror = None,
    hub_endpoint: HubEndpoint = None,
    s3_endpoint: S3Endpoint = None,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Prepare, train, evaluate and publish on this machine; credentials come from the environment."""
    console = Console(stderr=True)
    manifest = load_manifest(file, changes or [], console)
    outcome = run_with_progress(manifest, make_platform(hub_mirror, hub_endpoint, s3_endpoint), console)
    if output is not OutputFormat.TABLE:
        print_data(outcome.model_dump(mode="json", by_alias=True, exclude_none=True), output)
    else:
        show_result(outcome, Console())


def load_manifest(file: str, changes: list[str], console: Console) -> JobManifest:
    """Return the one QLoRAJob of a file with the changes applied, or exit with every problem."""
    try:
        overrides = [parse_override(change) for change in changes]
        return parse_manifest(read_single_job(file, overrides), LOCAL_RULES)
    except (OverrideError, YamlError, ManifestError) as error:
        exit_error(console, Reason.INVALID_SPEC, str(error))


def run_with_progress(manifest: JobManifest, platform: Platform, console: Console) -> TerminationMessage:
    """Run with progress on the console; turn errors that the user can fix into a message and an exit code."""
    with exit_on_error(console, "nothing was published", exit_error):
        trainer = load_trainer()
        with open_screen(console) as screen:
            return run_locally(manifest, platform, trainer, screen)
