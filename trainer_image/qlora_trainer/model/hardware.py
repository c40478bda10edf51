"""Hardware detection, done once so that all decisions are pure functions."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import torch

from qlora_api.accelerators import DeviceName
from qlora_api.reasons import Reason
from qlora_api.units import GIB, KIB
from qlora_trainer.errors import RunError

_MEMORY: Final = Path("/proc/meminfo")
_CGROUP_LIMIT: Final = Path("/sys/fs/cgroup/memory.max")
_CGROUP_USAGE: Final = Path("/sys/fs/cgroup/memory.current")
_UNKNOWN_BYTES: Final = 8 * GIB
"""Assumed free memory if the system does not report it (macOS)."""


@dataclass(frozen=True)
class Hardware:
    """The device of a run."""

    device: DeviceName
    capability: tuple[int, int] | None
    """CUDA compute capability: (8, 0) is sm_80; None for a CPU."""
    native_bf16: bool
    free_bytes: int
    name: str
    flash_attention: bool = False
    """The flash_attn package is installed; the model may still not support it."""


def observe_hardware(device: DeviceName) -> Hardware:
    """Detect the device that the plan names, or raise AcceleratorMissing."""
    if device == "cpu":
        bf16 = bool(torch.cpu.get_capabilities().get("avx512_bf16", False))
        threads = torch.get_num_threads()
        return Hardware("cpu", None, bf16, _free_host_bytes(), f"CPU, {threads} thread{'s' if threads > 1 else ''}")
    if not torch.cuda.is_available():
        raise RunError(
            Reason.ACCELERATOR_MISSING,
            "the plan assigns a GPU to this pod, but torch finds no CUDA device; check the node's driver and device "
            "plugin",
        )
    capability = torch.cuda.get_device_capability()
    check_kernels(capability, torch.cuda.get_arch_list(), torch.cuda.get_device_name())
    free, _ = torch.cuda.mem_get_info()
    return Hardware(
        device, capability, capability >= (8, 0), free, torch.cuda.get_device_name(), _has_flash_attention()
    )


def check_kernels(capability: tuple[int, int], architectures: Sequence[str], name: str) -> None:
    """Check that torch has kernels for a GPU; its own error, "no kernel image", comes with the first operation.

    Args:
        capability: Compute capability of the GPU.
        architectures: What torch was compiled for: sm_75, which also runs on later minor versions, or compute_90, which
            also runs on everything later.
        name: The GPU's name, for the message.

    Raises:
        RunError: ACCELERATOR_MISSING, which another node can cure.

    """
    if not any(_runs_on(architecture, capability) for architecture in architectures):
        raise RunError(
            Reason.ACCELERATOR_MISSING,
            f"the GPU of this node, {name} (sm_{capability[0]}{capability[1]}), is none that the trainer's torch has "
            f"kernels for ({', '.join(architectures)}); name another one in spec.resources.gpuProduct",
        )


def _runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Return whether code compiled for an architecture runs on a GPU; sm_90a is for features that only it has."""
    kind, _, number = architecture.partition("_")
    compiled = (int(number.rstrip("af")[:-1]), int(number.rstrip("af")[-1]))
    if kind == "compute":
        return compiled <= capability
    return compiled[0] == capability[0] and compiled[1] <= capability[1]


def _has_flash_attention() -> bool:
    # The package of FlashAttention 4 has the same name, and no kernels of version 2.
    return find_spec("flash_attn") is not None and find_spec("flash_attn_2_cuda") is not None


def _free_host_bytes() -> int:
    """Return the free memory of the host, or of the container if that is less, in bytes."""
    try:
        available = _available_bytes(_MEMORY.read_text())
    except (OSError, KeyError):
        return _UNKNOWN_BYTES
    try:
        limit = _CGROUP_LIMIT.read_text().strip()
        return available if limit == "max" else min(available, int(limit) - int(_CGROUP_USAGE.read_text()))
    except (OSError, ValueError):
        return available


def _available_bytes(meminfo: str) -> int:
    """Return MemAvailable in bytes; /proc/meminfo has KiB."""
    fields = dict(line.split(":", 1) for line in meminfo.splitlines() if ":" in line)
    return int(fields["MemAvailable"].split()[0]) * KIB


def torch_device(device: DeviceName) -> torch.device:
    """Return this process's device."""
    return torch.device("cpu") if device == "cpu" else torch.device(device, torch.cuda.current_device())


def release_cached_memory(device: DeviceName) -> None:
    """Release unused memory of torch's caching allocator, so that another process can use it."""
    if device != "cpu":
        torch.cuda.empty_cache()


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak so far, in bytes: reserved by the allocator on a GPU, resident set size on a CPU."""
    if device.type != "cpu":
        return int(torch.cuda.max_memory_reserved(device))
    import resource  # noqa: PLC0415 (missing on Windows, where the rest of the module works)

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB
