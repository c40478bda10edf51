"""A registry on loopback, so that only the layers that changed travel from a build to the node."""

import json
import shutil
from pathlib import Path
from typing import Final

import yaml

from tests.cluster.host.addresses import free_ports
from tests.cluster.host.paths import CACHE, ensure_folder
from tests.cluster.host.processes import Processes
from tests.cluster.programs.binaries import binary

HOME: Final = CACHE / "registry"
DATA: Final = HOME / "data"

LIMIT_BYTES: Final = 12 * 2**30
"""Beyond this the registry starts empty: it is only a stop on the way, and nothing ever leaves it."""


def ensure_registry(processes: Processes) -> str:
    """Return the address of the running registry, started if it is not."""
    port = kept_port()
    if not processes.running("registry"):
        remove_if_large()
        processes.start("registry", [binary("registry"), "serve", write_config(port)])
        processes.wait_for_port("registry", "127.0.0.1", port)
    return f"127.0.0.1:{port}"


def remove_if_large() -> None:
    """Forget all layers when those of old images have piled up."""
    if sum(path.stat().st_size for path in DATA.rglob("data")) > LIMIT_BYTES:
        shutil.rmtree(DATA)


def kept_port() -> int:
    """Return the port used before: buildah remembers by address which layers the registry has."""
    path = ensure_folder(HOME) / "port.json"
    if not path.exists():
        path.write_text(json.dumps(free_ports(1)[0]))
    return int(json.loads(path.read_text()))


def write_config(port: int) -> Path:
    """Write the registry's configuration: a folder, plain HTTP, loopback only."""
    path = HOME / "config.yml"
    storage = {"filesystem": {"rootdirectory": str(DATA)}, "delete": {"enabled": True}}
    config = {"version": 0.1, "storage": storage, "http": {"addr": f"127.0.0.1:{port}"}, "log": {"level": "warn"}}
    path.write_text(yaml.safe_dump(config))
    return path
