"""The GPUs that a run can be planned for: from the labels of Node objects, or given by hand."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

from qlora_api.accelerators import MIG_PREFIX, NVIDIA, Accelerator, Capability, accelerator_of_resource
from qlora_api.precision import ComputeDtype, compute_dtype_of, name_capability
from qlora_api.units import TIB
from qlora_api.v1alpha1 import ResourcesSpec
from qlora_planner.node_rules import find_obstacle, is_unready
from qlora_planner.quantities import parse_quantity

RESERVED_SHARE: Final = 0.02
"""Share of the memory in label and nvidia-smi that the driver reserves: a T4 of 15,360 MiB gives processes 14.75
GiB (1.7 %), an RTX 4090 of 24,564 MiB 23.64 GiB (1.5 %), an A30 of 24,576 MiB 23.53 GiB (2.0 %), an A100 of 40,960
MiB 39.50 GiB (1.3 %); read from torch's messages in hpcaitech/Open-Sora#697, 3DTopia/Phidias-Diffusion#8,
google/RB-Modulation#5 and TianheWu/CoSeR#10."""

MAX_GPUS_PER_NODE: Final = 1024
MAX_GPU_MEMORY: Final = 64 * TIB
"""Whatever a label says, a GPU with more is none; a typo must not become a plan."""
_NOT_SHARED: Final = frozenset({"0", "1"})


@dataclass(frozen=True)
class GpuPool:
    """Nodes with the same GPUs."""

    product: str
    """Value of the accelerator's product label; empty for any."""
    memory: int
    """Bytes of each GPU, as nvidia-smi shows them."""
    gpus_per_node: int = 1
    nodes: int = 1
    capability: Capability | None = None
    """None if unknown."""
    accelerator: Accelerator = NVIDIA
    unready: int = 0
    """Nodes of these that accept no pod for now, or whose GPUs are not all healthy."""

    @property
    def usable(self) -> int:
        """Return the bytes of each GPU that a process can allocate."""
        return int(self.memory * (1 - RESERVED_SHARE))

    def dtype(self, family: str) -> ComputeDtype | None:
        """Return the dtype that the trainer computes a model of this family in; None if it is not known before."""
        return compute_dtype_of(self.accelerator, self.capability, family)

    @property
    def partitioned(self) -> bool:
        """Return whether each of its GPUs is a partition of one, of which a process can use only one."""
        mark = self.accelerator.partition_mark
        return bool(mark) and mark in self.product

    def count_pods(self, gpus: int, *, ready: bool = False) -> int:
        """Return how many pods with so many GPUs its nodes hold, all of them or those that accept pods now."""
        nodes = self.nodes - self.unready if ready else self.nodes
        return nodes * (self.gpus_per_node // max(gpus, 1))


GpuInventory = tuple[GpuPool, ...]


def memory_of_product(product: str) -> int | None:
    """Return the bytes in a product's name or a MIG profile's, taken as decimal gigabytes; None if none.

    Args:
        product: Such as NVIDIA-A100-SXM4-80GB, NVIDIA-A100-SXM4-80GB-MIG-3g.40gb or nvidia.com/mig-3g.40gb.

    """
    sizes: list[str] = re.findall(r"([0-9]+)gb", product, re.IGNORECASE)
    return int(sizes[-1]) * 10**9 if sizes else None


class UnusableNodes(NamedTuple):
    """Nodes that never accept the pods of a run."""

    product: str
    why: str


def read_gpu_inventory(nodes: Iterable[Mapping[str, Any]], resources: ResourcesSpec) -> GpuInventory:
    """Return the GPUs of the nodes that would accept the pods of a run, smallest memory first.

    A node that accepts no pod for now is counted too: a run that waits for it must not be told that it cannot run.
    A node that cannot be read, or whose labels are no GPUs that exist, is left out; it does not hide the others.

    Args:
        nodes: Node objects as the API server returns them.
        resources: spec.resources, whose nodeSelector, tolerations, gpuProduct, cpu and memory apply.

    """
    found = [pool for node in nodes if isinstance(pool := _read_node(node, resources), GpuPool)]
    total = Counter(replace(pool, unready=0) for pool in found)
    unready = Counter(replace(pool, unready=0) for pool in found if pool.unready)
    counted = (replace(pool, nodes=count, unready=unready[pool]) for pool, count in total.items())
    return tuple(sorted(counted, key=lambda pool: (pool.memory, pool.gpus_per_node, pool.product)))


def find_unusable_nodes(nodes: Iterable[Mapping[str, Any]], resources: ResourcesSpec) -> tuple[UnusableNodes, ...]:
    """Return the GPU products of which no node accepts the pods of a run, each with why its first node does not."""
    read = [_read_node(node, resources) for node in nodes]
    usable = {pool.product for pool in read if isinstance(pool, GpuPool)}
    unusable = {item.product: item for item in reversed(read) if isinstance(item, UnusableNodes)}
    return tuple(item for product, item in sorted(unusable.items()) if product not in usable)


def _read_node(node: Mapping[str, Any], resources: ResourcesSpec) -> GpuPool | UnusableNodes | None:
    """Return the GPUs of a node, or why no pod can use them; None if it has none, or cannot be read."""
    accelerator = accelerator_of_resource(resources.gpu_resource)
    try:
        pool = _parse_gpus(node, accelerator)
        if pool is None:
            return None
        obstacle = _find_gpu_obstacle(node, pool) or find_obstacle(node, resources, accelerator)
        if obstacle is not None:
            return UnusableNodes(pool.product, obstacle)
        healthy = _count(node, "allocatable", accelerator)
        unready = is_unready(node, resources, accelerator) or healthy < pool.gpus_per_node
        return replace(pool, unready=int(unready))
    except (AttributeError, LookupError, TypeError, ValueError):
        return None


def _parse_gpus(node: Mapping[str, Any], accelerator: Accelerator) -> GpuPool | None:
    """Return the GPUs of a node, healthy or not; None if it has none, or no label with their memory."""
    labels: Mapping[str, str] = node["metadata"].get("labels", {})
    count = _count_gpus(node, accelerator)
    memory = labels.get(accelerator.memory_label, "")
    product: object = labels.get(accelerator.product_label, "")
    if not 1 <= count <= MAX_GPUS_PER_NODE or not memory.isdecimal() or not isinstance(product, str):
        return None
    size = int(memory) * accelerator.memory_unit
    if not 1 <= size <= MAX_GPU_MEMORY:
        return None
    return GpuPool(product, size, count, 1, _read_capability(labels, accelerator), accelerator)


def _count_gpus(node: Mapping[str, Any], accelerator: Accelerator) -> int:
    """Return how many GPUs a node has: while its device plugin or driver restarts, none of them is allocatable.

    The kubelet keeps an absent plugin's capacity for five minutes (pkg/kubelet/cm/devicemanager); the label stays. That
    of undivided GPUs counts the divided ones too.
    """
    labels: Mapping[str, str] = node["metadata"].get("labels", {})
    divided = accelerator.resource == NVIDIA.resource and any(label.startswith(MIG_PREFIX) for label in labels)
    labelled = "" if divided else labels.get(accelerator.count_label, "")
    advertised = max(_count(node, field, accelerator) for field in ("allocatable", "capacity"))
    return max(advertised, int(labelled)) if labelled.isdecimal() else advertised


def _count(node: Mapping[str, Any], field: str, accelerator: Accelerator) -> int:
    return parse_quantity(node.get("status", {}).get(field, {}).get(accelerator.resource, "0"))


def _read_capability(labels: Mapping[str, str], accelerator: Accelerator) -> Capability | None:
    if accelerator.capability_labels is None:
        return None
    major_label, minor_label = accelerator.capability_labels
    major, minor = labels.get(major_label, ""), labels.get(minor_label, "0")
    return (int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else None


def _find_gpu_obstacle(node: Mapping[str, Any], pool: GpuPool) -> str | None:
    """Return why the trainer cannot use the GPUs of a node, or None."""
    oldest, labels = pool.accelerator.oldest_capability, node["metadata"].get("labels", {})
    if pool.capability is not None and oldest is not None and pool.capability < oldest:
        return f"{name_capability(pool.capability)}, and the trainer has kernels from {name_capability(oldest)}"
    # A time-sliced GPU is advertised several times, and all replicas share its memory.
    if labels.get(pool.accelerator.replicas_label, "1") not in _NOT_SHARED:
        return "time-sliced: its memory is shared by several pods"
    return None
