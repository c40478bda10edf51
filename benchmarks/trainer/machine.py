"""The machine and the libraries of a comparison."""

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Final

import psutil
import torch

_LIBRARIES: Final = ("torch", "transformers", "peft", "bitsandbytes", "trl", "accelerate")
_GIB: Final = 2**30


@dataclass(frozen=True)
class Machine:
    """Hardware and software that affect a measurement."""

    processor: str
    cores: int
    memory_gib: float
    gpu: str
    system: str
    libraries: dict[str, str]
    load: float
    """Load average of the last minute before the comparison: above 0.5 other processes were running."""


def observe_machine(libraries: Sequence[str] = _LIBRARIES) -> Machine:
    """Return the hardware of this machine and the versions of the libraries."""
    cuda = torch.cuda.is_available()
    return Machine(
        processor=_processor(),
        cores=len(psutil.Process().cpu_affinity()),
        memory_gib=round(psutil.virtual_memory().total / _GIB, 1),
        gpu=torch.cuda.get_device_name() if cuda else "",
        system=f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        libraries={name: version(name) for name in libraries},
        load=round(psutil.getloadavg()[0], 2),
    )


def _processor() -> str:
    """Return the processor's name, family and bf16 support."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    bf16 = "AVX512-BF16" if torch.cpu.get_capabilities().get("avx512_bf16") else "no AVX512-BF16"
    return f"{fields.get('model name', platform.processor())} (family {fields.get('cpu family', '?')}, {bf16})"
