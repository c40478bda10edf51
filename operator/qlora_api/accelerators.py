"""The accelerators that a run may have: one row for each; NVIDIA's are the only ones that are supported."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

DeviceName = Literal["cpu", "cuda"]
"""Where a run computes, as torch calls it."""


@dataclass(frozen=True)
class Accelerator:
    """One vendor's GPUs, as Kubernetes and torch name them."""

    device: DeviceName
    resource: str
    """What a pod asks for, and the key of the taint that keeps other pods off its nodes."""
    product_label: str
    """On a node: what its GPUs are called."""
    memory_label: str
    """On a node: MiB of each GPU."""
    replicas_label: str
    """On a node: how many pods share a GPU by time; absent, 0 and 1: none do."""
    capability_labels: tuple[str, str]
    """On a node: both numbers of the compute capability."""


NVIDIA: Final = Accelerator(
    device="cuda",
    resource="nvidia.com/gpu",
    product_label="nvidia.com/gpu.product",
    memory_label="nvidia.com/gpu.memory",
    replicas_label="nvidia.com/gpu.replicas",
    capability_labels=("nvidia.com/gpu.compute.major", "nvidia.com/gpu.compute.minor"),
)
"""The labels are those of NVIDIA's GPU feature discovery."""
ACCELERATORS: Final = (NVIDIA,)
_BY_DEVICE: Final[Mapping[str, Accelerator]] = {accelerator.device: accelerator for accelerator in ACCELERATORS}


def accelerator_of(device: DeviceName) -> Accelerator:
    """Return what a run on a device asks for; on a CPU, whose nodes a spec may describe all the same, the usual one."""
    return _BY_DEVICE.get(device, NVIDIA)


def usual_device(gpus: int) -> DeviceName:
    """Return the device of a run whose GPUs nothing is known of but their number."""
    return NVIDIA.device if gpus else "cpu"
