"""The trainer's libraries, which come with torch: looked for first, set up once, imported late."""

import logging
import os
import warnings
from importlib.util import find_spec
from math import ceil
from pathlib import Path
from typing import Any, Final

from qlora_api.runconfig import Platform
from qlora_planner.gpu_inventory import RESERVED_SHARE, GpuInventory, GpuPool

_NOISY_LOGGERS: Final = ("DeepSpeed", "accelerate", "bitsandbytes", "deepspeed", "peft", "torch", "transformers")


def silence_libraries() -> None:
    """Turn off progress bars and warnings; errors still come as exceptions. Must be called before their import."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in _NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
        # DeepSpeed sets its level anew when it is imported, and writes to standard output, where a result belongs.
        logging.getLogger(name).addFilter(_is_error)
    warnings.simplefilter("ignore")


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


class NoTrainerError(Exception):
    """The trainer's libraries are not installed."""


class NoGpuError(Exception):
    """A GPU is asked for, and this computer has none."""


def set_up_libraries() -> Path:
    """Give the trainer's libraries the same settings as in a pod, and return the folder that they may write to.

    Must come before their import: they read their settings then.
    """
    if missing := [name for name in ("torch", "transformers", "peft") if find_spec(name) is None]:
        raise NoTrainerError(f"{', '.join(missing)} is not installed; run pip install 'qlora-operator[cli,trainer]'")
    from qlora_trainer.__main__ import configure_libraries  # noqa: PLC0415 (part of another installation)
    from qlora_trainer.runtime.rank import default_work  # noqa: PLC0415 (as above)

    silence_libraries()
    work = default_work()
    configure_libraries(work)
    return work


def open_source_resolver(platform: Platform) -> tuple[Any, Path]:
    """Return where models and adapters come from, with the credentials of the environment, and where to work."""
    work = set_up_libraries()
    from qlora_trainer.storage.credentials import environment_secrets  # noqa: PLC0415 (as above)
    from qlora_trainer.storage.snapshots import SourceResolver  # noqa: PLC0415 (as above)

    return SourceResolver(platform, environment_secrets()), work


def find_gpus() -> GpuInventory:
    """Return the GPUs of this computer as torch sees them; the first one's kind stands for all."""
    import torch  # noqa: PLC0415 (takes seconds)

    if not torch.cuda.is_available():
        return ()
    first = torch.cuda.get_device_properties(0)
    # torch leaves out what the driver keeps, and an offer has it in.
    memory = ceil(first.total_memory / (1 - RESERVED_SHARE))
    return (GpuPool(first.name, memory, torch.cuda.device_count(), 1, (first.major, first.minor)),)


def cuda_available() -> bool:
    """Return whether torch finds a GPU."""
    import torch  # noqa: PLC0415 (takes seconds)

    return torch.cuda.is_available()
