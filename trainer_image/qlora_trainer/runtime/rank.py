"""Which process of its run this one is, before anything is imported: the only reader of RANK."""

import os
from pathlib import Path
from typing import Final

RANK_PLACEHOLDER: Final = "{rank}"
"""Stands for the process's number in a path."""
DONE_SUFFIX: Final = ".done"
"""Suffix of the empty file that a process leaves instead of a last word when another one has it."""


def rank_of_process() -> int | None:
    """Return this process's number in its run; None without a launcher."""
    rank = os.environ.get("RANK")
    return int(rank) if rank else None


def is_local_main_process() -> bool:
    """Return whether this process is the only one or the first one of its pod."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def per_rank_path(path: Path) -> Path:
    """Return a path of this process's own, where the path asks for one."""
    return Path(str(path).replace(RANK_PLACEHOLDER, str(rank_of_process() or 0)))


def default_work() -> Path:
    """Return the cache folder of whoever runs this; a pod passes its own mount instead."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "qlora-operator"
