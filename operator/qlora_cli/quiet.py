"""Libraries talk to programmers; on the screen of `qlora` only the command itself speaks."""

import logging
import os
import warnings
from typing import Final

_LOUD: Final = ("DeepSpeed", "accelerate", "bitsandbytes", "deepspeed", "peft", "torch", "transformers")


def quieten_libraries() -> None:
    """Turn off progress bars and warnings; errors still come as exceptions. Must be called before their import."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in _LOUD:
        logging.getLogger(name).setLevel(logging.ERROR)
        # DeepSpeed sets its level anew when it is imported, and writes to standard output, where a result belongs.
        logging.getLogger(name).addFilter(_is_error)
    warnings.simplefilter("ignore")


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
