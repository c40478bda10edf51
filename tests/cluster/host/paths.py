"""Where the test cluster keeps what it builds, runs and stores."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

REPOSITORY: Final = Path(__file__).resolve().parents[3]
"""The checkout; the Dockerfile is at its root."""

MODULES: Final = Path(__file__).resolve().parents[1] / "modules"
"""The Go modules: one for all programs that can share the versions of libraries, so that each is compiled once."""

CACHE: Final = Path(os.environ.get("QLORA_TEST_CACHE", Path.home() / ".cache" / "qlora-operator"))
"""Everything that is worth keeping between runs; nothing is written to the checkout."""

STATES: Final = CACHE / "state"
"""One folder per running cluster, removed when it stops."""


def ensure_folder(path: Path) -> Path:
    """Return the folder, made if it was missing."""
    path.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold a lock that other processes of this machine wait for; it ends with this process at the latest."""
    ensure_folder(path.parent)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
