"""Where the trainer may write on this computer."""

import os
from pathlib import Path


def default_work() -> Path:
    """Return the cache folder of whoever runs this; a pod passes its own mount instead."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "qlora-operator"
