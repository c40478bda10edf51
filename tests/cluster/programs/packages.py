"""The Debian packages that a node, the image builds and tests of pages need, installed when they are missing."""

import os
import shutil
from collections.abc import Sequence
from typing import Final

from tests.cluster.host.commands import run
from tests.cluster.host.paths import CACHE, lock
from tests.cluster.host.progress import HOW_TO_RUN, Unavailable, say

COMMANDS: Final = {
    "containerd": "containerd",
    "runc": "runc",
    "buildah": "buildah",
    "nft": "nftables",
    "conntrack": "conntrack",
    "debootstrap": "debootstrap",
    "ip": "iproute2",
    "openssl": "openssl",
    "/usr/lib/cni/bridge": "containernetworking-plugins",
    "/bin/busybox": "busybox-static",
    "chromium": "chromium",
}
"""A command that proves that its package is there."""

INSTALL_LOCK: Final = CACHE / "packages.lock"


def ensure_commands(*commands: str) -> None:
    """Make the commands available, or say why that is impossible here."""
    if find_missing(commands):
        with lock(INSTALL_LOCK):  # another process may install the same, and apt-get lets nobody wait
            install(find_missing(commands))


def find_missing(commands: Sequence[str]) -> list[str]:
    """Return the packages of those commands that are not there."""
    return sorted({COMMANDS[command] for command in commands if not shutil.which(command)})


def install(packages: list[str]) -> None:
    """Install Debian packages, if any; services that they would start stay off."""
    if not packages:
        return
    require_root(f"installing {', '.join(packages)}")
    if not shutil.which("apt-get"):
        raise Unavailable(f"needs {', '.join(packages)} and there is no apt-get here; {HOW_TO_RUN}")
    say(f"installing {', '.join(packages)}")
    quiet = {"DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    run(["apt-get", "update", "-qq"], env=quiet)
    run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages], env=quiet)


def require_root(purpose: str) -> None:
    """Raise Unavailable unless this process is root."""
    if os.geteuid() != 0:
        raise Unavailable(f"{purpose} needs root; {HOW_TO_RUN}")
