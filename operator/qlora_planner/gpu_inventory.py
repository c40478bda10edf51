"""The GPUs that a run can be planned for: from the labels of Node objects, or given by hand."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any, Final

from qlora_api.accelerators import ACCELERATORS, NVIDIA, Accelerator
from qlora_api.units import GIB, KIB, MIB, TIB
from qlora_api.v1alpha1 import ResourcesSpec, Toleration

RESERVED_SHARE: Final = 0.02
"""Share of the memory in label and nvidia-smi that the driver reserves: a T4 of 15,360 MiB gives processes 14.75
GiB (1.7 %), an RTX 4090 of 24,564 MiB 23.64 GiB (1.5 %), an A30 of 24,576 MiB 23.53 GiB (2.0 %), an A100 of 40,960
MiB 39.50 GiB (1.3 %); read from torch's messages in hpcaitech/Open-Sora#697, 3DTopia/Phidias-Diffusion#8,
google/RB-Modulation#5 and TianheWu/CoSeR#10."""

_UNITS: Final = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY: Final = {"Ki": KIB, "Mi": MIB, "Gi": GIB, "Ti": TIB}
_QUANTITY: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)(Ki|Mi|Gi|Ti|k|M|G|T)?")
MAX_GPUS_PER_NODE: Final = 1024
MAX_GPU_MEBIBYTES: Final = 64 * 1024 * 1024
"""64 TiB: whatever a label says, a GPU with more is none; a typo must not become a plan."""
_NOT_SHARED: Final = frozenset({"0", "1"})
_BLOCKING_EFFECTS: Final = frozenset({"NoSchedule", "NoExecute"})


@dataclass(frozen=True)
class GpuPool:
    """Nodes with the same GPUs."""

    product: str
    """Value of the accelerator's product label; empty for any."""
    memory: int
    """Bytes of each GPU, as nvidia-smi shows them."""
    gpus_per_node: int = 1
    nodes: int = 1
    capability: tuple[int, int] | None = None
    """(8, 0) for sm_80; None if unknown."""
    accelerator: Accelerator = NVIDIA

    @property
    def usable(self) -> int:
        """Return the bytes of each GPU that a process can allocate."""
        return int(self.memory * (1 - RESERVED_SHARE))


GpuInventory = tuple[GpuPool, ...]


def parse_quantity(quantity: str) -> int:
    """Return a Kubernetes quantity, such as 24Gi or 80G, in bytes.

    Raises:
        ValueError: It is not a quantity; the message says what to write.

    """
    match = _QUANTITY.fullmatch(quantity)
    if match is None:
        raise ValueError(f"'{quantity}' is not an amount of memory; write a number and a unit, as in 24Gi or 80G")
    size = float(match[1]) * (_UNITS | _BINARY)[match[2] or ""]
    if not isfinite(size):
        raise ValueError(f"'{quantity[:20]}…' is too large; write a number and a unit, as in 24Gi or 80G")
    return int(size)


def memory_of_product(product: str) -> int | None:
    """Return the bytes in a product's name, such as NVIDIA-A100-SXM4-80GB, taken as decimal gigabytes; None if none."""
    match = re.search(r"(\d+)GB", product)
    return int(match[1]) * 10**9 if match else None


def read_gpu_inventory(nodes: Iterable[Mapping[str, Any]], resources: ResourcesSpec) -> GpuInventory:
    """Return the GPUs of the nodes that would accept the pods of a run, smallest memory first.

    A node that cannot be read, or whose labels are no GPUs that exist, is left out; it does not hide the others.

    Args:
        nodes: Node objects as the API server returns them.
        resources: spec.resources, whose nodeSelector, tolerations and gpuProduct apply.

    """
    pools = Counter(
        pool
        for node in nodes
        for accelerator in ACCELERATORS
        if (pool := _read_if_accepted(node, resources, accelerator))
    )
    counted = (_with_nodes(pool, count) for pool, count in pools.items())
    return tuple(sorted(counted, key=lambda pool: (pool.memory, pool.gpus_per_node, pool.product)))


def _with_nodes(pool: GpuPool, count: int) -> GpuPool:
    return replace(pool, nodes=count)


def _read_if_accepted(node: Mapping[str, Any], resources: ResourcesSpec, accelerator: Accelerator) -> GpuPool | None:
    try:
        return _read_node(node, accelerator) if _accepts_pods(node, resources, accelerator) else None
    except (AttributeError, LookupError, TypeError, ValueError):
        return None


def _read_node(node: Mapping[str, Any], accelerator: Accelerator) -> GpuPool | None:
    """Return the GPUs of a node; None if it has none, no label with their memory, or ones too old for the trainer."""
    labels: Mapping[str, str] = node["metadata"].get("labels", {})
    count = parse_quantity(node.get("status", {}).get("allocatable", {}).get(accelerator.resource, "0"))
    mebibytes = labels.get(accelerator.memory_label, "")
    # A time-sliced GPU is advertised several times, and all replicas share its memory.
    shared = labels.get(accelerator.replicas_label, "1") not in _NOT_SHARED
    if not 1 <= count <= MAX_GPUS_PER_NODE or shared or not mebibytes.isdecimal():
        return None
    if not 1 <= int(mebibytes) <= MAX_GPU_MEBIBYTES:
        return None
    major_label, minor_label = accelerator.capability_labels
    major, minor = labels.get(major_label, ""), labels.get(minor_label, "0")
    capability = (int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else None
    if capability is not None and capability < accelerator.oldest_capability:
        return None
    product: object = labels.get(accelerator.product_label, "")
    if not isinstance(product, str):
        return None
    return GpuPool(product, int(mebibytes) * MIB, count, 1, capability, accelerator)


def _accepts_pods(node: Mapping[str, Any], resources: ResourcesSpec, accelerator: Accelerator) -> bool:
    """Return whether the scheduler could place a training pod there, whether or not the node is free."""
    labels: Mapping[str, str] = node["metadata"].get("labels", {})
    spec: Mapping[str, Any] = node.get("spec", {})
    product = {accelerator.product_label: resources.gpu_product} if resources.gpu_product else {}
    required = {**resources.node_selector, **product}
    return (
        not spec.get("unschedulable", False)
        and all(labels.get(key) == value for key, value in required.items())
        and all(_is_tolerated(taint, resources.tolerations, accelerator) for taint in spec.get("taints", ()))
    )


def _is_tolerated(taint: Mapping[str, str], tolerations: Iterable[Toleration], accelerator: Accelerator) -> bool:
    if taint.get("effect") not in _BLOCKING_EFFECTS or taint["key"] == accelerator.resource:
        return True
    return any(_tolerates(toleration, taint) for toleration in tolerations)


def _tolerates(toleration: Toleration, taint: Mapping[str, str]) -> bool:
    """Return whether a toleration matches a taint, as in Kubernetes: an absent key or effect matches all."""
    if toleration.effect not in {None, taint["effect"]} or toleration.key not in {None, taint["key"]}:
        return False
    if toleration.operator == "Exists":
        return True
    return toleration.key is not None and (toleration.value or "") == taint.get("value", "")
