"""Supported accelerators, one row each; so far NVIDIA GPUs only."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

DeviceName = Literal["cpu", "cuda"]
"""The device type of a run, as torch calls it."""


@dataclass(frozen=True)
class Accelerator:
    """The GPUs of one vendor, by their names in Kubernetes and torch."""

    device: DeviceName
    resource: str
    """The extended resource that a pod requests; also the key of the taint that keeps other pods off its nodes."""
    product_label: str
    """Node label: the GPU's product name."""
    memory_label: str
    """Node label: memory of each GPU, in MiB."""
    replicas_label: str
    """Node label: how many pods time-slice a GPU; absent, 0 and 1: it is not time-sliced."""
    capability_labels: tuple[str, str]
    """Node labels: major and minor number of the compute capability."""
    oldest_capability: tuple[int, int]
    """The oldest GPUs that the trainer's torch has kernels for."""


NVIDIA: Final = Accelerator(
    device="cuda",
    resource="nvidia.com/gpu",
    product_label="nvidia.com/gpu.product",
    memory_label="nvidia.com/gpu.memory",
    replicas_label="nvidia.com/gpu.replicas",
    capability_labels=("nvidia.com/gpu.compute.major", "nvidia.com/gpu.compute.minor"),
    oldest_capability=(7, 5),  # torch.cuda.get_arch_list() of the pinned wheel begins with sm_75: no V100, P100 or P40
)
"""The labels are those of NVIDIA GPU Feature Discovery."""
ACCELERATORS: Final = (NVIDIA,)
_BY_DEVICE: Final[Mapping[str, Accelerator]] = {accelerator.device: accelerator for accelerator in ACCELERATORS}


def accelerator_of(device: DeviceName) -> Accelerator:
    """Return the accelerator of a device; for the CPU NVIDIA's, because a spec may still select nodes by its labels."""
    return _BY_DEVICE.get(device, NVIDIA)


def usual_device(gpus: int) -> DeviceName:
    """Return the device of a run of which only the number of GPUs is known."""
    return NVIDIA.device if gpus else "cpu"
