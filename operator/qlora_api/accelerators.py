"""Supported accelerators, one row each; so far NVIDIA GPUs and their MIG partitions only."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from qlora_api.units import MIB

DeviceName = Literal["cpu", "cuda"]
"""The device type of a run, as torch calls it."""
Capability = tuple[int, int]
"""(8, 0) for sm_80."""


@dataclass(frozen=True)
class Accelerator:
    """The GPUs of one vendor, by their names in Kubernetes and torch."""

    device: DeviceName
    resource: str
    """The extended resource that a pod requests."""
    taints: frozenset[str]
    """Keys of the taints that keep other pods off its nodes."""
    product_label: str
    """Node label: the GPU's product name."""
    memory_label: str
    """Node label: memory of each GPU."""
    memory_unit: int = MIB
    """Bytes per unit of the memory label."""
    count_label: str = ""
    """Node label: how many of them the node has, whether or not a device plugin advertises them; empty if none."""
    replicas_label: str = ""
    """Node label: how many pods time-slice a GPU; absent, 0 and 1: it is not time-sliced."""
    launch_type: str = "MULTI_GPU"
    """What accelerate's configuration calls several processes on such GPUs."""
    partition_mark: str = ""
    """Part of the product's name if a resource is a partition of a GPU, of which a process can use only one."""
    capability_labels: tuple[str, str] | None = None
    """Node labels: major and minor number of the compute capability; None if the vendor has no such number."""
    oldest_capability: Capability | None = None
    """The oldest GPUs that the trainer's torch has kernels for; None: all of the vendor's."""
    native_bf16: Capability | None = None
    """The oldest GPUs with native bf16; None: all of the vendor's."""
    peak_tflops: Mapping[str, int] = field(default_factory=dict, hash=False)
    """Dense 16-bit TFLOP/s, by pattern of the product's name."""

    def has_native_bf16(self, capability: Capability | None) -> bool | None:
        """Return whether such a GPU computes in bf16; None if its capability has to be known."""
        if self.native_bf16 is None:
            return True
        return None if capability is None else capability >= self.native_bf16


NVIDIA: Final = Accelerator(
    device="cuda",
    resource="nvidia.com/gpu",
    taints=frozenset({"nvidia.com/gpu"}),
    product_label="nvidia.com/gpu.product",
    memory_label="nvidia.com/gpu.memory",
    count_label="nvidia.com/gpu.count",
    replicas_label="nvidia.com/gpu.replicas",
    partition_mark="-MIG-",  # NVIDIA/k8s-device-plugin#446: a process sees one MIG instance, however many the pod has
    capability_labels=("nvidia.com/gpu.compute.major", "nvidia.com/gpu.compute.minor"),
    oldest_capability=(7, 5),  # torch.cuda.get_arch_list() of the pinned wheel begins with sm_75: no V100, P100 or P40
    native_bf16=(8, 0),  # Ampere
    peak_tflops={  # NVIDIA's data sheets
        r"\bT4\b": 65,
        r"\bV100\b": 125,
        r"\bA10\b": 125,
        r"\bA30\b": 165,
        r"\bA40\b": 150,
        r"\bA100\b": 312,
        r"\bL4\b": 121,
        r"\bL40\b": 181,
        r"\bL40S\b": 362,
        r"RTX-3090\b": 71,
        r"RTX-4090\b": 165,
        r"\bH100-PCIE": 756,
        r"\bH100\b": 989,
        r"\bH200\b": 989,
        r"\bB200\b": 2250,
    },
)
"""The labels are those of NVIDIA GPU Feature Discovery."""
ACCELERATORS: Final = (NVIDIA,)
MIG_PREFIX: Final = "nvidia.com/mig-"
"""Start of the resources of NVIDIA's device plugin with the MIG strategy `mixed`, such as nvidia.com/mig-3g.40gb."""
MIG_PROFILE: Final = r"([1-7]c\.)?[1-7]g\.[1-9][0-9]{0,2}gb(\.[a-z]{2,8})*"
"""Compute slices, GPU slices, gigabytes, and attributes such as `me` (media engines)."""
PRODUCT_LABELS: Final = " or ".join(accelerator.product_label for accelerator in ACCELERATORS)
"""For descriptions of fields."""
_BY_DEVICE: Final[Mapping[str, Accelerator]] = {accelerator.device: accelerator for accelerator in ACCELERATORS}


def accelerator_of(device: DeviceName) -> Accelerator:
    """Return the accelerator of a device; for the CPU NVIDIA's, because a spec may still select nodes by its labels."""
    return _BY_DEVICE.get(device, NVIDIA)


def accelerator_of_resource(resource: str) -> Accelerator:
    """Return the accelerator that an extended resource is; feature discovery labels each MIG profile with its name."""
    if not resource.startswith(MIG_PREFIX):
        return NVIDIA
    return replace(
        NVIDIA,
        resource=resource,
        taints=NVIDIA.taints | {resource},
        product_label=f"{resource}.product",
        memory_label=f"{resource}.memory",
        count_label=f"{resource}.count",
        replicas_label=f"{resource}.replicas",
        peak_tflops={},
    )


def usual_device(gpus: int) -> DeviceName:
    """Return the device of a run of which only the number of GPUs is known."""
    return NVIDIA.device if gpus else "cpu"
