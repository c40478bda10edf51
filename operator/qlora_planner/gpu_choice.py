"""Chooses the GPU products that a run may use: all that can hold it and give the same result, with one layout."""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from qlora_api.units import format_gib
from qlora_api.v1alpha1.status import MAX_GPU_PRODUCTS, MAX_PLAN_REASON
from qlora_planner.gpu_inventory import GpuInventory, GpuPool, UnusableNodes
from qlora_planner.memory.estimate import TrainingWorkload
from qlora_planner.sharding_limits import supports_dtype
from qlora_planner.sizing import (
    GpuAllocation,
    Misfit,
    Sizing,
    check_known,
    find_allocations,
    find_conflict,
    size_allocation,
)

_AND_MORE: Final = ", …"


@dataclass(frozen=True)
class GpuChoice:
    """The GPUs that the pods of a run may use, and the layout, which fits the smallest of them."""

    sizing: Sizing
    pools: tuple[GpuPool, ...]
    """In the order in which they are preferred: smallest memory first, those that give another result last."""
    reasons: tuple[str, ...]
    """Which products fit, and why others are left out; empty if there is but one."""
    min_memory: int | None = None
    """Least memory of a GPU in bytes, as its label has it, where the product alone does not tell; None elsewhere."""

    @property
    def products(self) -> tuple[str, ...]:
        """Return the values of the product label, in that order; none if a GPU has no such label."""
        names = tuple(dict.fromkeys(pool.product for pool in self.pools))
        return names[:MAX_GPU_PRODUCTS] if all(names) else ()


def choose_gpus(
    work: TrainingWorkload, inventory: GpuInventory, unusable: Sequence[UnusableNodes] = ()
) -> GpuChoice | Misfit | None:
    """Choose the GPU products for a run.

    What they do not agree in would change the result or end the run: the dtype, and the optimizer that method full
    falls back to. So only those that agree are chosen: the ones with the most GPUs. A queue decides by itself which
    GPUs it gives to a run, so all that fit are chosen for a single pod of it; the pods of a gang have to agree.

    Args:
        work: The run.
        inventory: GPUs of the cluster.
        unusable: Products that are left out in any case, to be named with their reason.

    Returns:
        The choice; the closest misfit if no GPU can hold the run; None if the cluster has fewer GPUs than requested.

    Raises:
        UnknownModelError: The memory of this model or adapter is not known.

    """
    check_known(work)
    sized = [size_allocation(work, allocation) for allocation in find_allocations(work, inventory, flexible=False)]
    fitting = _prefer_roomy([sizing for sizing in sized if isinstance(sizing, Sizing)])
    groups = _find_groups(work, fitting, others_are_too_small=len(fitting) < len(sized))
    if not groups:
        return None if fitting else _nearest(work, sized)
    best = max(groups, key=lambda group: _rank(group, work.shape.family))
    offered = [*best, *(_other_groups(groups, best) if _queue_chooses(work) else ())]
    base = min(offered, key=lambda sizing: sizing.allocation.pool.usable)
    pools = (sizing.allocation.pool for sizing in offered)
    chosen = tuple(pool for pool in pools if supports_dtype(base.layout.sharing, pool.dtype(work.shape.family)))
    reasons = explain_products(work, base, inventory, chosen, unusable)
    return GpuChoice(base, chosen, reasons, _find_min_memory(base, inventory, chosen))


def _queue_chooses(work: TrainingWorkload) -> bool:
    """Return whether a queue may have quota for GPUs that give another result, and no other pod has to agree."""
    return work.spec.queue is not None and work.spec.resources.nodes == 1


def _other_groups(groups: Iterable[list[Sizing]], best: Sequence[Sizing]) -> list[Sizing]:
    """Return the sizings of the other groups on GPUs of the same vendor, whose resource the pods request."""
    vendor = best[0].allocation.pool.accelerator
    others = [sizing for group in groups if group is not best for sizing in group]
    return [sizing for sizing in others if sizing.allocation.pool.accelerator == vendor]


def _find_groups(
    work: TrainingWorkload, fitting: Sequence[Sizing], *, others_are_too_small: bool
) -> list[list[Sizing]]:
    """Return the groups to choose from; none if a run is better not sized, since no group has enough GPUs for it.

    Where it could land on GPUs that are too small, it waits for nodes of those that fit.
    """
    named = [sizing for sizing in fitting if sizing.allocation.pool.product]
    groups = _group_by_result(named or fitting, work.shape.family)
    enough = [group for group in groups if _count_pods(group) >= work.spec.resources.nodes]
    return enough or (groups if others_are_too_small else [])


def _prefer_roomy(fitting: list[Sizing]) -> list[Sizing]:
    """Return the sizings that fit with the usual overhead; if none does, those that might."""
    return [sizing for sizing in fitting if not sizing.tight] or fitting


def _nearest(work: TrainingWorkload, sized: Iterable[Sizing | Misfit]) -> Misfit | None:
    nodes = work.spec.resources.nodes
    misfits = [misfit for misfit in sized if isinstance(misfit, Misfit) and _pods(misfit.nearest.allocation) >= nodes]
    return min(misfits, key=lambda misfit: misfit.missing, default=None)


def _group_by_result(fitting: Iterable[Sizing], family: str) -> list[list[Sizing]]:
    """Return the sizings in groups that give the same result."""
    groups: dict[Hashable, list[Sizing]] = {}
    for sizing in fitting:
        groups.setdefault(_result_key(sizing, family), []).append(sizing)
    return list(groups.values())


def _result_key(sizing: Sizing, family: str) -> Hashable:
    """Return what must be equal where two GPUs give the same result; one whose dtype is not known equals no other."""
    pool = sizing.allocation.pool
    dtype = pool.dtype(family)
    unknown = (pool.product, pool.memory) if dtype is None or not pool.product else ()
    return (pool.accelerator.device, dtype, sizing.layout.optimizer, unknown)


def _pods(allocation: GpuAllocation, *, ready: bool = False) -> int:
    return allocation.pool.count_pods(allocation.gpus_per_node, ready=ready)


def _count_pods(group: Iterable[Sizing], *, ready: bool = False) -> int:
    return sum(_pods(sizing.allocation, ready=ready) for sizing in group)


def _rank(group: Sequence[Sizing], family: str) -> tuple[int, int, bool, int]:
    """Return the order of the groups: by the pods that run now, by all pods, bfloat16 first, the smallest first."""
    pool = group[0].allocation.pool
    return (
        _count_pods(group, ready=True),
        _count_pods(group),
        pool.dtype(family) == "bfloat16",
        -min(sizing.allocation.pool.memory for sizing in group),
    )


def _find_min_memory(base: Sizing, inventory: GpuInventory, chosen: Sequence[GpuPool]) -> int | None:
    """Return the memory to ask for where a product without a name, or a smaller GPU of the same name, is there."""
    names, memory = {pool.product for pool in chosen}, base.allocation.pool.memory
    ambiguous = any(pool.product in names and pool.memory < memory for pool in inventory)
    return memory if ambiguous or "" in names else None


def explain_products(
    work: TrainingWorkload,
    base: Sizing,
    inventory: GpuInventory,
    chosen: Sequence[GpuPool],
    unusable: Sequence[UnusableNodes] = (),
) -> tuple[str, ...]:
    """Return which products a run may use, and why others are left out.

    Args:
        work: The run.
        base: Its layout, on the smallest of the chosen GPUs.
        inventory: All GPUs.
        chosen: Those that the run may use.
        unusable: More products, each with why it is left out.

    """
    names = list(dict.fromkeys(pool.product for pool in chosen))
    left_out = {
        pool.product: _explain_left_out(work, base, pool)
        for pool in reversed(inventory)
        if pool.product and pool.product not in names
    }
    not_chosen = [UnusableNodes(product, why) for product, why in reversed(left_out.items())]
    fit = f"; sized for {base.allocation.pool.product}, the smallest of them"
    older = {
        pool.product: dtype for pool in chosen if (dtype := pool.dtype(work.shape.family)) not in (None, "bfloat16")
    }
    mixed = 0 < len(older) < len(chosen)
    dtype = next(iter(older.values()), None)
    return (
        *([_list("GPUs that fit: ", names[:MAX_GPU_PRODUCTS], fit)] if len(names) > 1 else []),
        *([_list(f"the queue chooses among them; dtype {dtype} on ", list(older), ", else bfloat16")] if mixed else []),
        *explain_unusable((*not_chosen, *unusable)),
    )


def explain_unusable(unusable: Sequence[UnusableNodes]) -> tuple[str, ...]:
    """Return one reason that names the GPU products which a run may not use, and why."""
    named = [f"{item.product} ({item.why})" for item in unusable if item.product]
    return (_list("GPUs left out: ", named),) if named else ()


def _explain_left_out(work: TrainingWorkload, base: Sizing, pool: GpuPool) -> str:
    """Return why the pods of a run may not use a GPU."""
    resources = work.spec.resources
    gpus = max(resources.gpus_per_node, 1)
    allocation = GpuAllocation(pool, resources.nodes, gpus)
    if pool.gpus_per_node < gpus:
        return f"{pool.gpus_per_node} on a node"
    if (conflict := find_conflict(work, allocation)) is not None:
        return conflict
    sizing = size_allocation(work, allocation)
    nearest = sizing.nearest if isinstance(sizing, Misfit) else sizing
    if isinstance(sizing, Misfit) or (nearest.tight and not base.tight):
        return f"{format_gib(nearest.estimate.peak - pool.usable)} too small"
    own, dtype = pool.dtype(work.shape.family), base.allocation.pool.dtype(work.shape.family)
    if own != dtype:
        return f"computes in {own or 'a dtype that no label tells'}, not {dtype or 'one that is known'}"
    if nearest.layout.optimizer != base.layout.optimizer:
        return f"optimizer {nearest.layout.optimizer}, not {base.layout.optimizer}"
    return "fewer GPUs than the run takes" if own else "no label tells its dtype"


def _list(start: str, items: Sequence[str], end: str = "") -> str:
    """Return a list as a sentence of a plan, which has a maximum length."""
    for count in range(len(items), 0, -1):
        sentence = start + ", ".join(items[:count]) + (_AND_MORE if count < len(items) else "") + end
        if len(sentence) <= MAX_PLAN_REASON:
            return sentence
    return f"{start}{items[0]}"[:MAX_PLAN_REASON]
