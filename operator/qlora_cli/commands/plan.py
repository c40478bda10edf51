"""`qlora plan`: the predicted memory of a run and how it will be executed, computed offline."""

from collections.abc import Iterator
from typing import Annotated, Final

import typer
from rich.table import Table

from qlora_api.escapes import escape_line
from qlora_api.units import GIB
from qlora_cli.console import Console, print_line
from qlora_cli.display.formats import print_data
from qlora_cli.errors import exit_error_without_remedy
from qlora_cli.manifests.job_files import read_jobs
from qlora_cli.manifests.loader import JobManifest, ManifestError, parse_manifest
from qlora_cli.manifests.model_config import NoConfigError, load_config
from qlora_cli.manifests.overrides import OverrideError, parse_override
from qlora_cli.manifests.yaml_documents import YamlError
from qlora_cli.options import HubMirror, OutputFormat, OutputOption
from qlora_planner.memory.estimate import SLACK
from qlora_planner.models.shapes import MismatchError, UnknownModelError
from qlora_planner.offline import OfflinePlan, make_offline_plan, to_json
from qlora_planner.quantities import parse_quantity
from qlora_planner.sizing import DoesNotFitError, GpuAllocation
from qlora_planner.validation import COMMON_RULES

_PEAK_PREFIX: Final = "peak "
"""Prefix of the plan's reason about peak memory, which is not printed because the table shows it in detail."""


def check_memory(quantity: str | None) -> str | None:
    """Validate --gpu-memory if it is given."""
    try:
        if quantity is not None and parse_quantity(quantity) < GIB:
            raise typer.BadParameter(f"{quantity!r} is less than 1 GiB; write a number and a unit, as in 24Gi")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return quantity


def plan(  # noqa: PLR0913, PLR0917 (an option each)
    files: Annotated[list[str], typer.Argument(help="Manifests; - reads standard input.", metavar="FILE...")],
    config: Annotated[
        str | None, typer.Option(help="Path of the model's config.json; default: looked up in the hub cache.")
    ] = None,
    gpu_memory: Annotated[
        str | None,
        typer.Option(
            metavar="QUANTITY",
            callback=check_memory,
            help="Memory per GPU, such as 24Gi. Default: the smallest common GPU that fits.",
        ),
    ] = None,
    gpus_per_node: Annotated[
        int | None,
        typer.Option(min=1, help="GPUs per node; the plan uses as few as are enough. Default: as in the manifest."),
    ] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Change a field, such as lora.rank=8.")
    ] = None,
    hub_mirror: HubMirror = None,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Show the memory that runs need and how they will be executed, without a cluster, a GPU or a network."""
    console = Console(stderr=True)
    try:
        jobs = [job for file in files for job in parse_jobs(file, changes or [])]
        offline_plans = [
            make_offline_plan(job.spec, load_config(job.spec.model, config, hub_mirror), gpu_memory, gpus_per_node)
            for job in jobs
        ]
    except (OverrideError, YamlError, ManifestError, NoConfigError, UnknownModelError, MismatchError) as error:
        exit_error_without_remedy(console, None, str(error))
    except DoesNotFitError as error:
        exit_error_without_remedy(console, None, f"does not fit: {error}")
    print_plans(jobs, offline_plans, output)


def parse_jobs(file: str, changes: list[str]) -> Iterator[JobManifest]:
    """Yield the QLoRAJobs of a file, with the overrides applied."""
    overrides = [parse_override(change) for change in changes]
    yield from (parse_manifest(document, COMMON_RULES) for document in read_jobs(file, overrides))


def print_plans(jobs: list[JobManifest], offline_plans: list[OfflinePlan], output: OutputFormat) -> None:
    """Print tables; for JSON and YAML one object, or a list if there are several QLoRAJobs."""
    if output is not OutputFormat.TABLE:
        found = [to_json(offline_plan) for offline_plan in offline_plans]
        print_data(found[0] if len(found) == 1 else found, output)
        return
    console = Console()
    for job, offline_plan in zip(jobs, offline_plans, strict=True):
        console.print(tabulate(job, offline_plan))
        for reason in offline_plan.reasons:
            if not reason.startswith(_PEAK_PREFIX):
                print_line(console, reason)


def tabulate(job: JobManifest, offline_plan: OfflinePlan) -> Table:
    """Return a table of the components of peak memory."""
    spec, weights = job.spec, offline_plan.work.shape.parameters
    bits = f", {spec.quantization.bits} bits" if spec.method == "qlora" else ""
    title = f"{job.metadata.name}: {spec.model.uri}, {weights:,} weights, {spec.method}{bits}"
    table = Table(title=escape_line(title), title_justify="left")
    table.add_column("on each GPU" if offline_plan.sizing.allocation.gpus_per_node else "in host memory")
    table.add_column("GiB", justify="right")
    table.add_column("")
    rows = memory_rows(offline_plan)
    for number, (name, size, note) in enumerate(rows):
        if size or name == "peak":
            table.add_row(name, f"{size / GIB:.2f}", note, end_section=number == len(rows) - 2)
    return table


def memory_rows(offline_plan: OfflinePlan) -> list[tuple[str, int, str]]:
    """Return the components of peak memory: name, bytes, note."""
    work, found, allocation = offline_plan.work, offline_plan.sizing.estimate, offline_plan.sizing.allocation
    layout = offline_plan.sizing.layout
    trainable = f"{work.trainable.parameters:,} weights in fp32"
    recomputed = "recomputed in backward" if layout.checkpointing else "saved for backward"
    activations = f"micro-batch {layout.micro_batch}, {recomputed}; with logits and dequantized weights"
    return [
        ("base", found.base.weights, f"{work.base.weights / 1e9:.2f} GB in total, as get_memory_footprint() counts"),
        ("scales", found.base.constants, "of quantization"),
        ("adapter", found.adapter, trainable),
        ("gradients", found.gradients, trainable if work.full_finetune else ""),
        ("optimizer", found.optimizer, layout.optimizer),
        ("activations", found.activations, activations),
        ("communication", found.communication, f"between {layout.processes} processes, {layout.strategy}"),
        ("fragmentation", found.peak - found.allocated - found.non_torch, f"of torch's allocator, {SLACK:.0%}"),
        ("context", found.non_torch, "of CUDA, cuBLAS and NCCL"),
        ("peak", found.peak, describe_capacity(allocation)),
    ]


def describe_capacity(allocation: GpuAllocation) -> str:
    """Return the memory that is available, for the row with the peak."""
    if not allocation.gpus_per_node:
        return f"of {allocation.pool.memory / GIB:.4g}, spec.resources.memory, which Python and torch share"
    name = allocation.pool.product or f"GPU of {allocation.pool.memory / GIB:.4g} GiB"
    return f"of {allocation.pool.usable / GIB:.2f} available to a process on a {name}"
