"""`qlora merge`: merges a published adapter with its base, into a local folder."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from qlora_api.local_requests import MergedFolder, MergeRequest
from qlora_api.report import MergeDifference
from qlora_api.runconfig import Platform
from qlora_cli.console import Console, print_line
from qlora_cli.display.formats import print_data
from qlora_cli.display.result import format_change
from qlora_cli.errors import exit_error_without_remedy, exit_on_error
from qlora_cli.local.trainer_libraries import open_source_resolver
from qlora_cli.options import (
    BaseModel,
    HubEndpoint,
    HubMirror,
    OutputFormat,
    OutputOption,
    S3Endpoint,
    make_platform,
)
from qlora_cli.uris import to_absolute_path, to_model_uri, to_uri


class Base(StrEnum):
    """What an adapter is merged into."""

    ORIGINAL = "original"
    DEQUANTIZED = "dequantised"


def merge(  # noqa: PLR0913, PLR0917 (an option each)
    adapter: Annotated[str, typer.Argument(help="Folder or s3:// URI of a published adapter.", metavar="ADAPTER")],
    to: Annotated[Path, typer.Option("--to", help="Folder for the merged model; new or empty.", metavar="FOLDER")],
    base: Annotated[
        Base, typer.Option(help="Base to merge into: the original weights, or the 4-bit ones of training, dequantized.")
    ] = Base.ORIGINAL,
    base_model: BaseModel = None,
    hub_mirror: HubMirror = None,
    hub_endpoint: HubEndpoint = None,
    s3_endpoint: S3Endpoint = None,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Merge an adapter with its base into one bf16 model, and measure the difference."""
    console = Console(stderr=True)
    platform = make_platform(hub_mirror, hub_endpoint, s3_endpoint)
    model = to_model_uri(base_model, "--base-model") if base_model else None
    to_absolute_path(str(to), "--to")
    request = MergeRequest(adapter=to_uri(adapter, "ADAPTER"), target=str(to), base=base.value, model=model)
    with exit_on_error(console, "nothing was written", exit_error_without_remedy):
        merged = run_merge(request, platform, console)
    if output is not OutputFormat.TABLE:
        print_data(merged.model_dump(mode="json", by_alias=True, exclude_none=True), output)
    else:
        show_merged(merged, Console())


def run_merge(request: MergeRequest, platform: Platform, console: Console) -> MergedFolder:
    """Merge, and print progress messages."""
    sources, work = open_source_resolver(platform)
    from qlora_trainer.merge_job import merge_published  # noqa: PLC0415 (comes with torch)

    return merge_published(request, sources, work, lambda text: print_line(console, text))


def show_merged(merged: MergedFolder, console: Console) -> None:
    """Print the difference that merging made, and where the model is."""
    difference = merged.merge.difference
    if difference is None:
        console.print("not measured: no held-out rows next to the adapter")
    else:
        console.print(difference_table(difference))
    print_line(console, merged.folder, "merged  ", "bold")


def difference_table(difference: MergeDifference) -> Table:
    """Return a table that compares the merged model with base and adapter unmerged."""
    table = Table(title=f"{difference.rows} held-out rows, {difference.tokens} answer tokens", title_justify="left")
    table.add_column("")
    for heading in ("base and adapter", "merged", "change"):
        table.add_column(heading, justify="right")
    before, after = difference.unmerged_loss, difference.merged_loss
    table.add_row("loss", f"{before:.3f}", f"{after:.3f}", format_change(before, after))
    table.add_row("logits", "", "", f"{difference.relative:.1%}, at most {difference.max_logit:.2f}")
    table.add_row("first choice", "", "", f"{difference.same_choice:.1%} the same")
    return table
