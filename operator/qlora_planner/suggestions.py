"""Suggests what would make a run fit: single changes of the manifest, lossless ones first, then more GPUs."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil
from typing import Final

from pydantic import BaseModel

from qlora_api.optimizers import ADAMW, ADAMW_8BIT
from qlora_api.units import GIB, format_gib
from qlora_api.v1alpha1 import QLoRAJobSpec
from qlora_planner.gpu_inventory import RESERVED_SHARE, GpuInventory
from qlora_planner.memory.estimate import TrainingWorkload
from qlora_planner.sizing import Misfit, Sizing, size_run

MIN_RANK: Final = 4
"""Below this rank, fewer adapter weights save next to nothing."""
MIN_LENGTH: Final = 128
"""Tokens; rows cut shorter than this are hardly worth training on."""


@dataclass(frozen=True)
class Suggestion:
    """A run with one change, and the manifest line that makes it."""

    sentence: str
    work: TrainingWorkload


def describe_misfit(work: TrainingWorkload, inventory: GpuInventory, misfit: Misfit) -> str:
    """Return by how much a run does not fit, and the least intrusive change that would make it fit."""
    nearest = misfit.nearest
    pool, layout = nearest.allocation.pool, nearest.layout
    gpu = pool.product or f"GPU of {format_gib(pool.memory)}"
    condition = f"with micro-batch {layout.micro_batch}{' and gradient checkpointing' if layout.checkpointing else ''}"
    if nearest.estimate.loads_more_than_it_trains:
        condition = "while every process loads the full base"
    elif not work.knows_activations:
        condition = "besides the activations of its layers, which are not estimated"
    return (
        f"needs {format_gib(nearest.estimate.peak)} per GPU {condition}, {format_gib(misfit.missing)} more than the "
        f"{format_gib(pool.usable)} that a process has on a {gpu}; {suggest_change(work, inventory, misfit)}"
    )


def suggest_change(work: TrainingWorkload, inventory: GpuInventory, misfit: Misfit) -> str:
    """Return the first change that fits, lossless ones first, or else the memory of a GPU that would suffice."""
    fits = "it fits" if work.knows_activations else "these parts fit"
    lossless = (change.sentence for change in find_lossless_changes(work, misfit) if _fits(change, inventory))
    lossy = (change.sentence for change in find_lossy_changes(work) if _fits(change, inventory))
    if (found := next(lossless, None) or _more_gpus(work, inventory) or next(lossy, None)) is not None:
        return f"{fits} with {found}"
    needed = ceil(misfit.nearest.estimate.peak / (1 - RESERVED_SHARE) / GIB)
    return f"{fits} on a GPU with {needed} GiB or more"


def _fits(change: Suggestion, inventory: GpuInventory) -> bool:
    return _does_fit(size_run(change.work, inventory))


def _does_fit(sizing: Sizing | Misfit | None) -> bool:
    return isinstance(sizing, Sizing) and not sizing.tight


def find_lossless_changes(work: TrainingWorkload, misfit: Misfit) -> Iterator[Suggestion]:
    """Yield changes that leave the result the same, apart from rounding."""
    spec = work.spec
    if spec.training.micro_batch_size is not None:
        change = _changed(spec, "training", micro_batch_size=None)
        yield Suggestion("spec.training.microBatchSize left out", replace(work, spec=change))
    if spec.quantization.bits == 4 and not spec.quantization.double_quant:
        change = _changed(spec, "quantization", double_quant=True)
        yield Suggestion("spec.quantization.doubleQuant true", replace(work, spec=change))
    if misfit.nearest.layout.optimizer == ADAMW.name:
        change = _changed(spec, "training", optimizer=ADAMW_8BIT.name)
        yield Suggestion(f"spec.training.optimizer {ADAMW_8BIT.name}", replace(work, spec=change))


def find_lossy_changes(work: TrainingWorkload) -> Iterator[Suggestion]:
    """Yield changes that alter the result, in steps of increasing loss."""
    yield from _fewer_bits(work)
    yield from _lower_ranks(work)
    yield from _shorter_rows(work)


def _fewer_bits(work: TrainingWorkload) -> Iterator[Suggestion]:
    bits = work.spec.quantization.bits
    if bits == 4 or work.spec.lora.init == "pissa":
        return
    change = _changed(work.spec, "quantization", bits=4).model_copy(update={"method": "qlora"})
    method = "" if work.spec.method == "qlora" else "spec.method qlora and "
    yield Suggestion(f"{method}spec.quantization.bits 4 instead of {bits}", replace(work, spec=change))


def _lower_ranks(work: TrainingWorkload) -> Iterator[Suggestion]:
    rank = work.spec.lora.rank
    while not work.full_finetune and (rank := rank // 2) >= MIN_RANK:
        change = _changed(work.spec, "lora", rank=rank)
        yield Suggestion(f"spec.lora.rank {rank} instead of {work.spec.lora.rank}", replace(work, spec=change))


def _shorter_rows(work: TrainingWorkload) -> Iterator[Suggestion]:
    max_length = length = work.spec.training.max_length
    while (length := length // 2) >= MIN_LENGTH:
        if length < work.rows.longest:
            change = _changed(work.spec, "training", max_length=length)
            rows = replace(work.rows, longest=length, mean=min(work.rows.mean, length))
            yield Suggestion(
                f"spec.training.maxLength {length} instead of {max_length}", replace(work, spec=change, rows=rows)
            )


def _more_gpus(work: TrainingWorkload, inventory: GpuInventory) -> str | None:
    """Return how many GPUs of the inventory would suffice, if sharding among several helps."""
    change = _changed(work.spec, "resources", nodes=1).model_copy(update={"distribution": "auto"})
    sizing = size_run(replace(work, spec=change), inventory, flexible=True)
    if not isinstance(sizing, Sizing) or sizing.tight:
        return None
    gpus, requested = sizing.allocation.gpus_per_node, work.spec.distribution
    strategy = (
        "" if requested in {"auto", sizing.layout.strategy} else f" and spec.distribution {sizing.layout.strategy}"
    )
    return f"spec.resources.gpusPerNode {gpus}{strategy}"


def _changed(spec: QLoRAJobSpec, block: str, **fields: object) -> QLoRAJobSpec:
    inner: BaseModel = getattr(spec, block)
    return spec.model_copy(update={block: inner.model_copy(update=fields)})
