"""Libraries talk to programmers; on the screen of `qlora run` only the run itself speaks."""

import logging
import os
import warnings
from typing import Final

_LOUD: Final = ("DeepSpeed", "accelerate", "bitsandbytes", "deepspeed", "peft", "torch", "transformers")


def quieten_libraries() -> None:
    """Turn off progress bars and warnings; errors still come as exceptions. Must be called before their import."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    for name in _LOUD:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
