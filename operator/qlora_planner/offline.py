"""A plan before anything is prepared: from a manifest, a model's config.json and GPUs that are named by hand."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil
from typing import Any, Final

from qlora_api.accelerators import usual_device
from qlora_api.units import MIB, format_gib
from qlora_api.v1alpha1 import QLoRAJobSpec
from qlora_planner.explain import explain_sizing
from qlora_planner.gpu_inventory import GpuInventory, GpuPool, memory_of_product, parse_quantity
from qlora_planner.memory.adapter import check_base
from qlora_planner.memory.estimate import Layout, MemoryEstimate, SequenceLengths, TrainingWorkload, estimate_memory
from qlora_planner.memory.weights import FP32
from qlora_planner.models.families import read_shape
from qlora_planner.plan import choose_micro_batch, choose_strategy, describe_accumulation
from qlora_planner.sizing import DoesNotFitError, GpuAllocation, Misfit, Sizing, size_run
from qlora_planner.suggestions import describe_misfit

_COMMON_GPUS: Final = (
    ("16 GB GPU (T4)", 15_360),
    ("24 GB GPU (A10, L4)", 23_028),
    ("40 GB GPU (A100)", 40_960),
    ("48 GB GPU (L40S)", 46_068),
    ("80 GB GPU (H100)", 81_559),
    ("141 GB GPU (H200)", 143_771),
)
"""Usual GPUs and their MiB, as nvidia-smi shows them."""


@dataclass(frozen=True)
class OfflinePlan:
    """A sized run."""

    work: TrainingWorkload
    sizing: Sizing
    reasons: tuple[str, ...]


def make_offline_plan(
    spec: QLoRAJobSpec, config: Mapping[str, Any], gpu_memory: str | None = None, gpus_per_node: int | None = None
) -> OfflinePlan:
    """Size a run whose rows are not known: as if all of them were maxLength tokens long."""
    longest = spec.training.max_length
    shape = read_shape(config)
    check_base(shape, spec.quantization)
    work = TrainingWorkload(spec, shape, SequenceLengths(longest, longest), usual_device(_gpus(spec, gpus_per_node)))
    if work.device == "cpu":
        return _on_cpu(work)
    offer, flexible = _inventory(spec, gpu_memory, gpus_per_node), gpus_per_node is not None
    found = size_run(work, offer, flexible=flexible)
    if found is None:
        raise DoesNotFitError("spec.training.globalBatchSize is less than the GPUs asked for; raise it")
    if isinstance(found, Misfit):
        raise DoesNotFitError(describe_misfit(work, offer, found))
    return OfflinePlan(work, found, (*explain_sizing(work, found, flexible=flexible), *_explain_rest(work, found)))


def _gpus(spec: QLoRAJobSpec, gpus_per_node: int | None) -> int:
    return spec.resources.gpus_per_node if gpus_per_node is None else gpus_per_node


def _inventory(spec: QLoRAJobSpec, gpu_memory: str | None, gpus_per_node: int | None) -> GpuInventory:
    """Return the GPUs to choose from: the given ones, those of the product, or the usual ones."""
    count, product, nodes = _gpus(spec, gpus_per_node), spec.resources.gpu_product, spec.resources.nodes
    if gpu_memory is not None:
        return (GpuPool(product, parse_quantity(gpu_memory), count, nodes),)
    if (memory := memory_of_product(product)) is not None:
        return (GpuPool(product, memory, count, nodes),)
    return tuple(GpuPool(name, mebibytes * MIB, count, nodes) for name, mebibytes in _COMMON_GPUS)


def _on_cpu(work: TrainingWorkload) -> OfflinePlan:
    """Use the micro-batch and the strategy of every plan for CPUs; like the trainer, recompute what would not fit."""
    training, resources = work.spec.training, work.spec.resources
    micro = choose_micro_batch(training, ceil(training.global_batch_size / resources.processes), "cpu")
    strategy = choose_strategy(work.spec.distribution, resources.processes)
    layout = Layout(resources.processes, strategy.name, micro.size)
    room = GpuAllocation(GpuPool("", parse_quantity(resources.memory), 0), resources.nodes, 0)
    if estimate_memory(work, layout).peak > room.pool.memory:
        layout = replace(layout, checkpointing=True)
    sizing = Sizing(room, layout, estimate_memory(work, layout))
    reasons = (
        "device cpu: spec.resources.gpusPerNode is 0",
        micro.reason,
        *_explain_host_memory(sizing, resources.memory),
        *_explain_rest(work, sizing),
    )
    return OfflinePlan(work, sizing, reasons)


def _explain_host_memory(sizing: Sizing, memory: str) -> tuple[str, ...]:
    peak = sizing.estimate.peak
    verdict = "within" if peak <= sizing.allocation.pool.memory else "more than"
    return (
        f"gradient checkpointing {'on' if sizing.layout.checkpointing else 'off'}: the trainer decides by free memory",
        f"peak {format_gib(peak)} of tensors if the CPU has no bf16, {verdict} spec.resources.memory {memory}",
    )


def _explain_rest(work: TrainingWorkload, sizing: Sizing) -> tuple[str, ...]:
    whole, processes, micro = work.spec.training.global_batch_size, sizing.layout.processes, sizing.layout.micro_batch
    return (
        describe_accumulation(whole, _share(work, sizing), micro, processes),
        f"rows as long as spec.training.maxLength, {work.rows.longest} tokens, since no dataset was read",
    )


def _share(work: TrainingWorkload, sizing: Sizing) -> int:
    """Return the rows of a step that one process takes."""
    return ceil(work.spec.training.global_batch_size / sizing.layout.processes)


def to_json(plan: OfflinePlan) -> dict[str, Any]:
    """Return the figures that scripts read; bytes are of one GPU, but for the base and the adapter as a whole."""
    work, sizing = plan.work, plan.sizing
    adapter = 0 if work.full_finetune else work.trainable.parameters
    found: MemoryEstimate = sizing.estimate
    return {
        "weightsBytes": work.base.weights,
        "adapterParameters": adapter,
        "adapterBytes": adapter * FP32,
        "optimizerBytes": found.optimizer,
        "activationBytes": found.activations,
        "peakBytesPerGpu": found.peak,
        "microBatch": sizing.layout.micro_batch,
        "gradientAccumulation": ceil(_share(work, sizing) / sizing.layout.micro_batch),
        "gpus": sizing.allocation.nodes * sizing.allocation.gpus_per_node,
        "nodes": sizing.allocation.nodes,
        "strategy": sizing.layout.strategy,
        "reasons": list(plan.reasons),
    }
