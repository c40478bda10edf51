"""The trainer's libraries, which come with torch: looked for first, set up once, imported late."""

from importlib.util import find_spec
from math import ceil
from pathlib import Path
from typing import Any

from qlora_api.runconfig import Platform
from qlora_cli.quiet import quieten_libraries
from qlora_operator.plan.offer import RESERVED_SHARE, Offer, Pool


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
    from qlora_trainer.work import default_work  # noqa: PLC0415 (as above)

    quieten_libraries()
    work = default_work()
    configure_libraries(work)
    return work


def open_places(platform: Platform) -> tuple[Any, Path]:
    """Return where models and adapters come from, with the credentials of the environment, and where to work."""
    work = set_up_libraries()
    from qlora_trainer.secrets import environment_secrets  # noqa: PLC0415 (as above)
    from qlora_trainer.snapshot import Places  # noqa: PLC0415 (as above)

    return Places(platform, environment_secrets()), work


def find_gpus() -> Offer:
    """Return the GPUs of this computer as torch sees them; the first one's kind stands for all."""
    import torch  # noqa: PLC0415 (takes seconds)

    if not torch.cuda.is_available():
        return ()
    first = torch.cuda.get_device_properties(0)
    # torch leaves out what the driver keeps, and an offer has it in.
    memory = ceil(first.total_memory / (1 - RESERVED_SHARE))
    return (Pool(first.name, memory, torch.cuda.device_count(), 1, (first.major, first.minor)),)


def cuda_available() -> bool:
    """Return whether torch finds a GPU."""
    import torch  # noqa: PLC0415 (takes seconds)

    return torch.cuda.is_available()
