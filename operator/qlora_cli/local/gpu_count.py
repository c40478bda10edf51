"""Counts the GPUs of this machine without torch."""

import subprocess
from shutil import which
from typing import Final

_SECONDS: Final = 10
"""Longest time that nvidia-smi takes while it initializes the driver."""


def count_gpus() -> int:
    """Return how many GPUs nvidia-smi lists; 0 without it."""
    program = which("nvidia-smi")
    if program is None:
        return 0
    try:
        listed = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=_SECONDS, check=True)  # noqa: S603 (the driver's own program)
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
