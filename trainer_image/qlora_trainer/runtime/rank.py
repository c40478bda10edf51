"""Rank of this process, available before torch is imported; the only module that reads RANK."""

import os
from pathlib import Path
from typing import Final

RANK_PLACEHOLDER: Final = "{rank}"
"""Placeholder for the rank in a path."""
DONE_SUFFIX: Final = ".done"
"""Suffix of the empty file that a process writes instead of a termination message if another rank writes that."""


def rank_of_process() -> int | None:
    """Return this process's rank; None without a launcher."""
    rank = os.environ.get("RANK")
    return int(rank) if rank else None


def is_local_main_process() -> bool:
    """Return whether this process has local rank 0 in its pod, or is the only one."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def per_rank_path(path: Path) -> Path:
    """Replace the rank placeholder in a path."""
    return Path(str(path).replace(RANK_PLACEHOLDER, str(rank_of_process() or 0)))


def default_work() -> Path:
    """Return the user's cache folder; pods pass a mounted volume instead."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "qlora-operator"
