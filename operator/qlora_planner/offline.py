"""Plans without a cluster: from a manifest, the model's config.json and GPUs given by hand."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil
from typing import Any, Final

from qlora_api.accelerators import usual_device
from qlora_api.units import MIB, format_gib
from qlora_api.v1alpha1 import QLoRAJobSpec
from qlora_planner.explain import explain_sizing
from qlora_planner.gpu_inventory import GpuInventory, GpuPool, memory_of_product
from qlora_planner.memory.adapter import check_base
from qlora_planner.memory.estimate import Layout, MemoryEstimate, SequenceLengths, TrainingWorkload, estimate_memory
from qlora_planner.memory.weights import FP32
from qlora_planner.models.families import read_shape
from qlora_planner.plan import choose_micro_batch, choose_strategy, describe_accumulation
from qlora_planner.quantities import parse_quantity
from qlora_planner.sizing import DoesNotFitError, GpuAllocation, Misfit, Sizing, size_run
from qlora_planner.suggestions import describe_misfit

_COMMON_GPUS: Final = (
    ("16 GB GPU (T4)", 15_360, (7, 5)),
    ("24 GB GPU (A10, L4)", 23_028, (8, 6)),
    ("40 GB GPU (A100)", 40_960, (8, 0)),
    ("48 GB GPU (L40S)", 46_068, (8, 9)),
    ("80 GB GPU (H100)", 81_559, (9, 0)),
    ("141 GB GPU (H200)", 143_771, (9, 0)),
)
"""Common GPUs, their memory in MiB, as nvidia-smi shows it, and their compute capability."""


@dataclass(frozen=True)
class OfflinePlan:
    """A sized run and the reasons for its layout."""

    work: TrainingWorkload
    sizing: Sizing
    reasons: tuple[str, ...]


def make_offline_plan(
    spec: QLoRAJobSpec, config: Mapping[str, Any], gpu_memory: str | None = None, gpus_per_node: int | None = None
) -> OfflinePlan:
    """Size a run without its dataset: as if every row had spec.training.maxLength tokens.

    Args:
        spec: The spec.
        config: The model's config.json.
        gpu_memory: Memory of each GPU as a Kubernetes quantity; None takes that of spec.resources.gpuProduct, or tries
            common GPUs.
        gpus_per_node: The most GPUs to use; the plan takes as few as suffice. None takes spec.resources as it is.

    Raises:
        DoesNotFitError: No GPU can hold the run; the message says by how much, and what would fit.
        MismatchError: The manifest asks for what the model does not have.
        UnknownModelError: The memory of this kind of model is not known.

    """
    max_length = spec.training.max_length
    shape = read_shape(config)
    check_base(shape, spec.quantization)
    work = TrainingWorkload(
        spec, shape, SequenceLengths(max_length, max_length), usual_device(_gpus(spec, gpus_per_node))
    )
    if work.device == "cpu":
        return _on_cpu(work)
    inventory, flexible = _inventory(spec, gpu_memory, gpus_per_node), gpus_per_node is not None
    sizing = size_run(work, inventory, flexible=flexible)
    if sizing is None:
        raise DoesNotFitError("spec.training.globalBatchSize is smaller than the number of GPUs; raise it")
    if isinstance(sizing, Misfit):
        raise DoesNotFitError(describe_misfit(work, inventory, sizing))
    reasons = (
        *explain_sizing(work, sizing, flexible=flexible),
        *_explain_gpus(work, inventory, flexible=flexible),
        *_explain_rest(work, sizing),
    )
    return OfflinePlan(work, sizing, reasons)


def _gpus(spec: QLoRAJobSpec, gpus_per_node: int | None) -> int:
    return spec.resources.gpus_per_node if gpus_per_node is None else gpus_per_node


def _inventory(spec: QLoRAJobSpec, gpu_memory: str | None, gpus_per_node: int | None) -> GpuInventory:
    """Return the GPUs to choose from: the given ones, those of the product, or common ones."""
    count, resources = _gpus(spec, gpus_per_node), spec.resources
    product, nodes = resources.gpu_product, resources.nodes
    if gpu_memory is not None:
        return (GpuPool(product, parse_quantity(gpu_memory), count, nodes),)
    named = memory_of_product(resources.gpu_resource) or memory_of_product(product)
    if named is not None:
        return (GpuPool(product, named, count, nodes),)
    return tuple(GpuPool(name, size * MIB, count, nodes, capability) for name, size, capability in _COMMON_GPUS)


def _explain_gpus(work: TrainingWorkload, inventory: GpuInventory, *, flexible: bool) -> tuple[str, ...]:
    """Say which GPUs hold the run, and which do not; nothing where only one kind was given."""
    if len(inventory) == 1:
        return ()
    sizings = {pool: size_run(work, (pool,), flexible=flexible) for pool in inventory}
    fit = [f"{pool.product} in {pool.dtype(work.shape.family)}" for pool, sizing in sizings.items() if _holds(sizing)]
    other = [f"{pool.product}" for pool, sizing in sizings.items() if not _holds(sizing)]
    left_out = f"; left out: {', '.join(other)}" if other else ""
    return (f"GPUs that fit: {', '.join(fit)}{left_out}",) if fit else ()


def _holds(sizing: Sizing | Misfit | None) -> bool:
    return isinstance(sizing, Sizing) and not sizing.tight


def _on_cpu(work: TrainingWorkload) -> OfflinePlan:
    """Use the default micro-batch and strategy for CPUs; like the trainer, checkpoint if the activations do not fit."""
    training, resources = work.spec.training, work.spec.resources
    micro = choose_micro_batch(training, ceil(training.global_batch_size / resources.processes), "cpu")
    strategy = choose_strategy(work.spec.distribution, resources.processes)
    layout = Layout(resources.processes, strategy.name, micro.size)
    allocation = GpuAllocation(GpuPool("", parse_quantity(resources.memory), 0), resources.nodes, 0)
    if estimate_memory(work, layout).peak > allocation.pool.memory:
        layout = replace(layout, checkpointing=True)
    sizing = Sizing(allocation, layout, estimate_memory(work, layout))
    if (peak := sizing.estimate.peak) > allocation.pool.memory:
        raise DoesNotFitError(
            f"spec.resources.memory is {resources.memory}, and the weights and activations of the run alone take "
            f"{format_gib(peak)}, without Python and its libraries; raise it, or lower maxLength or microBatchSize"
        )
    reasons = (
        "device cpu: spec.resources.gpusPerNode is 0",
        micro.reason,
        *_explain_host_memory(sizing, resources.memory),
        *_explain_rest(work, sizing),
    )
    return OfflinePlan(work, sizing, reasons)


def _explain_host_memory(sizing: Sizing, memory: str) -> tuple[str, ...]:
    peak = sizing.estimate.peak
    relation = "within" if peak <= sizing.allocation.pool.memory else "more than"
    return (
        f"gradient checkpointing {'on' if sizing.layout.checkpointing else 'off'}: the trainer decides by free memory",
        f"peak {format_gib(peak)} of tensors if the CPU has no bf16, {relation} spec.resources.memory {memory}",
    )


def _explain_rest(work: TrainingWorkload, sizing: Sizing) -> tuple[str, ...]:
    global_batch_size, processes, micro = (
        work.spec.training.global_batch_size,
        sizing.layout.processes,
        sizing.layout.micro_batch,
    )
    return (
        describe_accumulation(global_batch_size, _rows_per_process(work, sizing), micro, processes),
        f"rows as long as spec.training.maxLength, {work.rows.longest} tokens, since no dataset was read",
    )


def _rows_per_process(work: TrainingWorkload, sizing: Sizing) -> int:
    """Return the rows of a step per process."""
    return ceil(work.spec.training.global_batch_size / sizing.layout.processes)


def to_json(plan: OfflinePlan) -> dict[str, Any]:
    """Return the figures of a plan as JSON; bytes are per GPU, except those of base and adapter, which are totals."""
    work, sizing = plan.work, plan.sizing
    adapter = 0 if work.full_finetune else work.trainable.parameters
    estimate: MemoryEstimate = sizing.estimate
    return {
        "weightsBytes": work.base.weights,
        "adapterParameters": adapter,
        "adapterBytes": adapter * FP32,
        "optimizerBytes": estimate.optimizer,
        "activationBytes": estimate.activations,
        "peakBytesPerGpu": estimate.peak,
        "microBatch": sizing.layout.micro_batch,
        "gradientAccumulation": ceil(_rows_per_process(work, sizing) / sizing.layout.micro_batch),
        "gpus": sizing.allocation.nodes * sizing.allocation.gpus_per_node,
        "nodes": sizing.allocation.nodes,
        "strategy": sizing.layout.strategy,
        "reasons": list(plan.reasons),
    }
