"""Which GPUs, how many, and how each is used: the smallest offer that fits, and on it the fastest way that fits."""

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
from qlora_planner.sharding_limits import can_be_shared

COMPUTE_BOUND_TOKENS: Final = 2048
"""Tokens of a pass from which recomputing activations for more of them loses time: dequantising a weight moves 4.5
bytes, in which time an A100 (2.0 TB/s, 312 TFLOP/s) multiplies it with 350 tokens; with 2,048 that is a sixth."""


class DoesNotFitError(Exception):
    """No GPU of the offer can hold the run; the message says by how much, and what would fit."""


@dataclass(frozen=True)
class GpuAllocation:
    """GPUs that a run could have."""

    pool: GpuPool
    nodes: int
    gpus_per_node: int

    @property
    def processes(self) -> int:
        """Return the processes of the run: one per GPU, or one per node that uses its cores."""
        return self.nodes * max(self.gpus_per_node, 1)


@dataclass(frozen=True)
class Sizing:
    """A way to run."""

    allocation: GpuAllocation
    layout: Layout
    estimate: MemoryEstimate

    @property
    def tight(self) -> bool:
        """Return whether it fits only if torch's allocator holds less beyond its tensors than it usually does."""
        return self.estimate.peak > self.allocation.pool.usable

    @property
    def cannot_fit(self) -> bool:
        """Return whether the tensors alone do not fit."""
        return self.estimate.minimum > self.allocation.pool.usable


@dataclass(frozen=True)
class Misfit:
    """The way that comes nearest, and by how much it does not fit."""

    nearest: Sizing

    @property
    def missing(self) -> int:
        """Return the bytes that each GPU lacks."""
        return self.nearest.estimate.peak - self.nearest.allocation.pool.usable


def size_run(work: TrainingWorkload, inventory: GpuInventory, *, flexible: bool = False) -> Sizing | Misfit | None:
    """Choose GPUs and their use; None where the offer has not as many GPUs as the spec asks for.

    A flexible run takes as few GPUs of a node as suffice, another what its spec says.
    """
    _check_known(work)
    tried = [_size_allocation(work, room) for room in find_allocations(work, inventory, flexible=flexible)]
    fitting = [sizing for sizing in tried if isinstance(sizing, Sizing)]
    if fitting:
        return min(fitting, key=lambda sizing: (sizing.tight, _cost(sizing.allocation), sizing.allocation.processes))
    misfits = [sizing for sizing in tried if isinstance(sizing, Misfit)]
    return min(misfits, key=lambda misfit: misfit.missing, default=None)


def _check_known(work: TrainingWorkload) -> None:
    """Refuse what nobody has measured: peft adds an expert's update to a copy of all weights, layer after layer."""
    if (
        any(block.stacked for block in work.shape.blocks)
        and work.spec.lora.targets == (ALL_LINEAR,)
        and not work.full_finetune
    ):
        raise UnknownModelError(
            f"spec.lora.targets: the memory of adapters on the stacked experts of {work.shape.family} is not known; "
            f"name the projections of attention, as in q_proj and v_proj, or {SET_GPUS_EXPLICITLY}"
        )


def find_allocations(work: TrainingWorkload, inventory: GpuInventory, *, flexible: bool) -> tuple[GpuAllocation, ...]:
    """Return the GPUs that could be asked for."""
    resources, whole = work.spec.resources, work.spec.training.global_batch_size
    return tuple(
        GpuAllocation(pool, resources.nodes, gpus)
        for pool in inventory
        if pool.nodes >= resources.nodes
        for gpus in (_counts(pool.gpus_per_node) if flexible else [max(resources.gpus_per_node, 1)])
        if gpus <= pool.gpus_per_node and resources.nodes * gpus <= whole
    )


def _counts(most: int) -> list[int]:
    """Return 1, 2, 4 and so on, and what a node has."""
    return sorted({1 << power for power in range(most.bit_length())} | {most})


def _cost(allocation: GpuAllocation) -> int:
    """Memory that others cannot use meanwhile."""
    return allocation.processes * allocation.pool.memory


def _size_allocation(work: TrainingWorkload, allocation: GpuAllocation) -> Sizing | Misfit:
    """Take the first of the ways, the simplest first, that fits; else the smallest, if it may."""
    nearest: Sizing | None = None
    for layout in find_layouts(work, allocation.processes):
        fastest = _fastest(work, allocation, layout)
        if isinstance(fastest, Sizing):
            return fastest
        if nearest is None or fastest.nearest.estimate.peak < nearest.estimate.peak:
            nearest = fastest.nearest
    assert nearest is not None  # noqa: S101 (there is always a layout)
    # An estimate that may be too large must not refuse what could run; a training that runs out of memory says so.
    return Misfit(nearest) if nearest.cannot_fit else nearest


def find_layouts(work: TrainingWorkload, processes: int) -> Iterator[Layout]:
    """Yield ways to share the work and to keep the optimizer's state, the simplest first."""
    for strategy in find_strategies(work, processes):
        for optimizer in find_optimizers(work, strategy):
            yield Layout(processes, strategy.name, 1, False, optimizer)


def find_strategies(work: TrainingWorkload, processes: int) -> tuple[Strategy, ...]:
    """Return how processes may share the work: as asked for, else what divides least."""
    if processes == 1:
        return (SINGLE,)
    asked = work.spec.distribution
    if asked != "auto":
        return (STRATEGIES[asked],)
    return tuple(strategy for strategy in FOR_SEVERAL if can_be_shared(work.spec, strategy))


def find_optimizers(work: TrainingWorkload, strategy: Strategy) -> tuple[OptimizerName, ...]:
    """Return the optimizers that the trainer may take: with method full it falls back to 8-bit state by itself."""
    asked = work.spec.training.optimizer
    if asked != "auto":
        return (asked,)
    return (ADAMW.name, ADAMW_8BIT.name) if work.full_finetune and not strategy.shards_optimizer else (ADAMW.name,)


def _fastest(work: TrainingWorkload, allocation: GpuAllocation, layout: Layout) -> Sizing | Misfit:
    """Choose micro-batch and checkpointing: recomputing costs a forward pass, and short passes leave a GPU idle."""
    sizes = micro_batches(work, allocation.processes)
    plain = _largest(work, allocation, layout, sizes)
    if plain is not None and (plain.layout.micro_batch == sizes[0] or pass_tokens(work, plain) >= COMPUTE_BOUND_TOKENS):
        return plain
    recomputing = replace(layout, checkpointing=True)
    saving = _largest(work, allocation, recomputing, sizes)
    if saving is not None or plain is not None:
        return saving or plain  # type: ignore[return-value]
    least = replace(recomputing, micro_batch=sizes[-1])
    return Misfit(Sizing(allocation, least, estimate_memory(work, least)))


def micro_batches(work: TrainingWorkload, processes: int) -> tuple[int, ...]:
    """Return the micro-batches that divide a process's rows, largest first; more than fill a pass help nobody."""
    training = work.spec.training
    if training.micro_batch_size is not None:
        return (training.micro_batch_size,)
    share = ceil(training.global_batch_size / processes)
    most = max(1, int(PACK_TOKENS / work.rows.mean))
    return tuple(size for size in range(min(share, most), 0, -1) if share % size == 0)


def pass_tokens(work: TrainingWorkload, sizing: Sizing) -> float:
    """Return the tokens of a usual pass."""
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
