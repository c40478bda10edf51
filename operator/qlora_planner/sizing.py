"""Sizes a run: the cheapest GPUs of the inventory that fit, and the fastest layout that fits on them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil
from typing import Final

from qlora_api.optimizers import ADAMW, ADAMW_8BIT, OptimizerName
from qlora_api.strategies import FOR_SEVERAL, SINGLE, STRATEGIES, Strategy
from qlora_planner.gpu_inventory import GpuInventory, GpuPool
from qlora_planner.memory.adapter import ALL_LINEAR
from qlora_planner.memory.estimate import PACK_TOKENS, Layout, MemoryEstimate, TrainingWorkload, estimate_memory
from qlora_planner.models.shapes import SET_GPUS_EXPLICITLY, UnknownModelError
from qlora_planner.sharding_limits import supports_dtype, supports_strategy

COMPUTE_BOUND_TOKENS: Final = 2048
"""Tokens of a pass above which gradient checkpointing for a larger pass loses time: dequantizing a weight moves 4.5
bytes, in which time an A100 (2.0 TB/s, 312 TFLOP/s) multiplies it with 350 tokens; at 2,048 that is a sixth."""


class DoesNotFitError(Exception):
    """No GPU of the inventory can hold the run; the message says by how much, and what would fit."""


@dataclass(frozen=True)
class GpuAllocation:
    """GPUs that a run could use."""

    pool: GpuPool
    nodes: int
    gpus_per_node: int

    @property
    def processes(self) -> int:
        """Return the number of processes: one per GPU, or one per node on CPUs."""
        return self.nodes * max(self.gpus_per_node, 1)


@dataclass(frozen=True)
class Sizing:
    """A layout on some GPUs, with its estimated memory."""

    allocation: GpuAllocation
    layout: Layout
    estimate: MemoryEstimate

    @property
    def tight(self) -> bool:
        """Return whether it fits only if torch's caching allocator has less overhead than usual."""
        return self.estimate.peak > self.allocation.pool.usable

    @property
    def cannot_fit(self) -> bool:
        """Return whether the tensors alone, without allocator overhead, exceed the memory."""
        return self.estimate.minimum > self.allocation.pool.usable


@dataclass(frozen=True)
class Misfit:
    """The layout that comes closest to fitting."""

    nearest: Sizing

    @property
    def missing(self) -> int:
        """Return the bytes that each GPU is short of."""
        return self.nearest.estimate.peak - self.nearest.allocation.pool.usable


def size_run(work: TrainingWorkload, inventory: GpuInventory, *, flexible: bool = False) -> Sizing | Misfit | None:
    """Choose GPUs and a layout for a run.

    Args:
        work: The run.
        inventory: GPUs to choose from.
        flexible: Use as few GPUs per node as suffice, instead of spec.resources.gpusPerNode.

    Returns:
        The best sizing; the closest misfit if none fits; None if the inventory has fewer GPUs than requested.

    Raises:
        UnknownModelError: The memory of this model or adapter is not known.

    """
    check_known(work)
    candidates = [
        size_allocation(work, allocation)
        for allocation in find_allocations(work, inventory, flexible=flexible)
        if allocation.pool.count_pods(allocation.gpus_per_node) >= allocation.nodes
    ]
    fitting = [sizing for sizing in candidates if isinstance(sizing, Sizing)]
    if fitting:
        return min(fitting, key=lambda sizing: (sizing.tight, _cost(sizing.allocation), sizing.allocation.processes))
    misfits = [sizing for sizing in candidates if isinstance(sizing, Misfit)]
    return min(misfits, key=lambda misfit: misfit.missing, default=None)


def check_known(work: TrainingWorkload) -> None:
    """Reject adapters on stacked experts: peft adds each update to a copy of all weights, which was never measured."""
    if (
        work.knows_activations
        and any(block.stacked for block in work.shape.blocks)
        and work.spec.lora.targets == (ALL_LINEAR,)
        and not work.full_finetune
    ):
        raise UnknownModelError(
            f"spec.lora.targets: the memory of adapters on the stacked experts of {work.shape.family} is not known; "
            f"name the projections of attention, as in q_proj and v_proj, or {SET_GPUS_EXPLICITLY}"
        )


def find_allocations(work: TrainingWorkload, inventory: GpuInventory, *, flexible: bool) -> tuple[GpuAllocation, ...]:
    """Return the allocations that each GPU of the inventory allows, whatever the number of its nodes."""
    resources, global_batch_size = work.spec.resources, work.spec.training.global_batch_size
    allocations = (
        GpuAllocation(pool, resources.nodes, gpus)
        for pool in inventory
        for gpus in (_counts(pool.gpus_per_node) if flexible else [max(resources.gpus_per_node, 1)])
    )
    return tuple(
        allocation
        for allocation in allocations
        if allocation.gpus_per_node <= allocation.pool.gpus_per_node
        and allocation.processes <= global_batch_size
        and find_conflict(work, allocation) is None
    )


def find_conflict(work: TrainingWorkload, allocation: GpuAllocation) -> str | None:
    """Return why a run of several processes cannot use a kind of GPU, or None."""
    if allocation.processes == 1:
        return None
    if allocation.pool.partitioned:
        return "partitions of a GPU cannot train together"
    requested = STRATEGIES.get(work.spec.distribution)
    dtype = allocation.pool.dtype(work.shape.family)
    if requested is not None and not supports_dtype(requested, dtype):
        return f"{requested.name} cannot compute in {dtype}"
    return None


def _counts(maximum: int) -> list[int]:
    """Return the powers of two up to a maximum, and the maximum."""
    return sorted({1 << power for power in range(maximum.bit_length())} | {maximum})


def _cost(allocation: GpuAllocation) -> int:
    """Return the GPU memory in bytes that the allocation blocks."""
    return allocation.processes * allocation.pool.memory


def size_allocation(work: TrainingWorkload, allocation: GpuAllocation) -> Sizing | Misfit:
    """Return the first layout that fits, the simplest first; else the smallest, if it might fit."""
    nearest: Sizing | None = None
    work = work.on(allocation.pool.accelerator, allocation.pool.capability)
    for layout in find_layouts(work, allocation):
        fastest = _fastest(work, allocation, layout)
        if isinstance(fastest, Sizing):
            return fastest
        if nearest is None or fastest.nearest.estimate.peak < nearest.estimate.peak:
            nearest = fastest.nearest
    assert nearest is not None  # noqa: S101 (there is always a layout)
    # The estimate may be too high, and must not reject what could run; a run that is out of memory reports it.
    return Misfit(nearest) if nearest.cannot_fit else nearest


def find_layouts(work: TrainingWorkload, allocation: GpuAllocation) -> Iterator[Layout]:
    """Yield combinations of strategy and optimizer, the simplest first."""
    for strategy in find_strategies(work, allocation):
        for optimizer in find_optimizers(work, strategy):
            yield Layout(allocation.processes, strategy.name, 1, False, optimizer)


def find_strategies(work: TrainingWorkload, allocation: GpuAllocation) -> tuple[Strategy, ...]:
    """Return the strategies to try: the requested one, or all that apply, those that shard least first."""
    if allocation.processes == 1:
        return (SINGLE,)
    requested = work.spec.distribution
    if requested != "auto":
        return (STRATEGIES[requested],)
    dtype = allocation.pool.dtype(work.shape.family)
    return tuple(
        strategy
        for strategy in FOR_SEVERAL
        if supports_strategy(work.spec, strategy) and supports_dtype(strategy, dtype)
    )


def find_optimizers(work: TrainingWorkload, strategy: Strategy) -> tuple[OptimizerName, ...]:
    """Return the optimizers that the trainer may use: with method full, it falls back to 8-bit state by itself."""
    requested = work.spec.training.optimizer
    if requested != "auto":
        return (requested,)
    return (ADAMW.name, ADAMW_8BIT.name) if work.full_finetune and not strategy.shards_optimizer else (ADAMW.name,)


def _fastest(work: TrainingWorkload, allocation: GpuAllocation, layout: Layout) -> Sizing | Misfit:
    """Choose micro-batch and gradient checkpointing.

    Checkpointing costs a forward pass, but short passes leave a GPU idle.
    """
    sizes = micro_batches(work, allocation.processes)
    plain = _largest(work, allocation, layout, sizes)
    if plain is not None and (plain.layout.micro_batch == sizes[0] or pass_tokens(work, plain) >= COMPUTE_BOUND_TOKENS):
        return plain
    checkpointed = replace(layout, checkpointing=True)
    with_checkpointing = _largest(work, allocation, checkpointed, sizes)
    if with_checkpointing is not None or plain is not None:
        return with_checkpointing or plain  # type: ignore[return-value]
    smallest = replace(checkpointed, micro_batch=sizes[-1])
    return Misfit(Sizing(allocation, smallest, estimate_memory(work, smallest)))


def micro_batches(work: TrainingWorkload, processes: int) -> tuple[int, ...]:
    """Return the divisors of the rows per process, largest first, up to a pass of PACK_TOKENS."""
    training = work.spec.training
    if training.micro_batch_size is not None:
        return (training.micro_batch_size,)
    rows = ceil(training.global_batch_size / processes)
    maximum = max(1, int(PACK_TOKENS / work.rows.mean))
    return tuple(size for size in range(min(rows, maximum), 0, -1) if rows % size == 0)


def pass_tokens(work: TrainingWorkload, sizing: Sizing) -> float:
    """Return the tokens of an average pass."""
    return min(sizing.layout.micro_batch * work.rows.mean, max(PACK_TOKENS, work.rows.longest))


def _largest(
    work: TrainingWorkload, allocation: GpuAllocation, layout: Layout, sizes: tuple[int, ...]
) -> Sizing | None:
    for size in sizes:
        candidate = replace(layout, micro_batch=size)
        estimate = estimate_memory(work, candidate)
        if estimate.peak <= allocation.pool.usable:
            return Sizing(allocation, candidate, estimate)
    return None
