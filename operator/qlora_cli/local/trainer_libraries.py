"""The trainer's libraries: checks that they are installed, and configures them before their import."""

import logging
import os
import warnings
from importlib.util import find_spec
from math import ceil
from pathlib import Path
from typing import Any, Final

from qlora_api.accelerators import ACCELERATORS
from qlora_api.runconfig import Platform
from qlora_planner.gpu_inventory import RESERVED_SHARE, GpuInventory, GpuPool

_NOISY_LOGGERS: Final = ("DeepSpeed", "accelerate", "bitsandbytes", "deepspeed", "peft", "torch", "transformers")


def silence_libraries() -> None:
    """Turn off the libraries' progress bars and warnings; errors still raise. Must be called before their import."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in _NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
        # DeepSpeed resets its level when it is imported, and logs to standard output, which is for the result.
        logging.getLogger(name).addFilter(_is_error)
    warnings.simplefilter("ignore")


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


class NoTrainerError(Exception):
    """The trainer's libraries are not installed."""


class NoGpuError(Exception):
    """A GPU is requested, but this machine has none."""


def set_up_libraries() -> Path:
    """Configure the trainer's libraries as in a pod, and return their work folder.

    Must be called before their import, when they read their settings.

    Raises:
        NoTrainerError: A library is not installed.

    """
    if missing := [name for name in ("torch", "transformers", "peft") if find_spec(name) is None]:
        raise NoTrainerError(
            f"not installed: {', '.join(missing)}; run pip install '.[cli,trainer]' in a checkout of the project"
        )
    from qlora_trainer.__main__ import configure_libraries  # noqa: PLC0415 (part of the optional trainer)
    from qlora_trainer.runtime.rank import default_work  # noqa: PLC0415 (as above)

    silence_libraries()
    work = default_work()
    configure_libraries(work)
    return work


def open_source_resolver(platform: Platform) -> tuple[Any, Path]:
    """Return the resolver of model and adapter URIs, with credentials from the environment, and the work folder."""
    work = set_up_libraries()
    from qlora_trainer.storage.credentials import environment_secrets  # noqa: PLC0415 (as above)
    from qlora_trainer.storage.snapshots import SourceResolver  # noqa: PLC0415 (as above)

    return SourceResolver(platform, environment_secrets()), work


def find_gpus() -> GpuInventory:
    """Return the local GPUs as torch reports them; all are assumed to be of the first one's type."""
    import torch  # noqa: PLC0415 (takes seconds)

    for accelerator in ACCELERATORS:
        backend = torch.get_device_module(accelerator.device)
        if backend.is_available():
            first = backend.get_device_properties(0)
            # torch's total excludes the memory reserved by the driver; the inventory includes it.
            memory = ceil(first.total_memory / (1 - RESERVED_SHARE))
            capability = (first.major, first.minor) if accelerator.capability_labels else None
            return (GpuPool(first.name, memory, backend.device_count(), 1, capability, accelerator),)
    return ()


def cuda_available() -> bool:
    """Return whether torch finds a GPU."""
    import torch  # noqa: PLC0415 (takes seconds)

    return torch.cuda.is_available()
