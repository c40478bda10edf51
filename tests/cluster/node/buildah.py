"""buildah with its storage in the cache, and with this machine's way to the package registries."""

import os
import re
from pathlib import Path
from typing import Final

from tests.cluster.host.commands import run
from tests.cluster.host.paths import CACHE, ensure_folder
from tests.cluster.programs.packages import ensure_commands, require_root

HOME: Final = CACHE / "buildah"

CERTIFICATES: Final = Path("/etc/ssl/certs")
UV_CACHE: Final = CACHE / "uv"
"""Shared with `make setup`, so that an image takes the wheels that the developer already has."""

PASSED_ON: Final = re.compile(r"^(PIP|UV|SSL|HTTP|HTTPS|NO)_\w+$", re.IGNORECASE)
"""Variables that say how this machine reaches the registries; passed where the Dockerfile declares them as ARG."""


def buildah(*args: object) -> str:
    """Run buildah on the storage in the cache and return what it prints."""
    require_root("building images")
    ensure_commands("buildah")
    # Cache mounts of RUN and large blobs go to the temporary folder, which may be small elsewhere.
    environment = {"TMPDIR": str(ensure_folder(HOME / "tmp"))}
    storage = ["--root", HOME / "storage", "--runroot", HOME / "run", "--storage-driver", "overlay"]
    return run(["buildah", *storage, *args], env=environment)


def build(
    context: Path, dockerfile: Path, tag: str, *, target: str = "", arguments: dict[str, str] | None = None
) -> None:
    """Build one target of a Dockerfile under a tag; unchanged layers are taken from the last time."""
    values = {**machine_arguments(dockerfile.read_text()), **(arguments or {})}
    flags = [f"--build-arg={name}={value}" for name, value in values.items()]
    if target:
        flags.append(f"--target={target}")
    isolation = ["--isolation=chroot", "--layers", "--pull-never"]
    buildah("build", *isolation, *machine_volumes(), *flags, "--tag", tag, "--file", dockerfile, context)


def machine_arguments(dockerfile: str) -> dict[str, str]:
    """Return the values of this machine for those arguments that the Dockerfile declares."""
    declared = re.findall(r"^\s*ARG\s+(\w+)", dockerfile, re.MULTILINE)
    return {name: os.environ[name] for name in declared if name in os.environ and PASSED_ON.match(name)}


def machine_volumes() -> list[str]:
    """Mount what RUN needs to reach the registries; nothing of it becomes part of the image."""
    mounts = {CERTIFICATES: f"{CERTIFICATES}:ro", write_pip_config(): "/etc/pip.conf:ro"}
    mounts |= {write_uv_config(): "/etc/uv/uv.toml:ro", ensure_folder(UV_CACHE): "/root/.cache/uv:rw"}
    wheels = Path(os.environ.get("PIP_FIND_LINKS", ""))
    if wheels.is_absolute() and wheels.is_dir():
        mounts[wheels] = f"{wheels}:ro"
    return [f"--volume={source}:{place}" for source, place in mounts.items()]


def write_pip_config() -> Path:
    """Write this machine's PIP_ variables as the configuration file that pip reads in the build."""
    settings = {name[4:].lower().replace("_", "-"): os.environ[name] for name in os.environ if name.startswith("PIP_")}
    return write_config("pip.conf", ["[global]", *(f"{name} = {value}" for name, value in settings.items())])


def write_uv_config() -> Path:
    """Write the configuration with which uv trusts the certificates that the machine trusts."""
    lines = ["native-tls = true", 'link-mode = "copy"']
    if index := os.environ.get("UV_DEFAULT_INDEX") or os.environ.get("PIP_INDEX_URL"):
        lines.append(f'index-url = "{index}"')
    return write_config("uv.toml", lines)


def write_config(name: str, lines: list[str]) -> Path:
    """Write a small file beside the storage."""
    path = ensure_folder(HOME) / name
    path.write_text("\n".join([*lines, ""]))
    return path
