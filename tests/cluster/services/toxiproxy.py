"""A TCP proxy that spoils connections on request: toxiproxy."""

import json
import urllib.request
from dataclasses import dataclass
from typing import Any, Final

from tests.cluster.host.addresses import free_ports
from tests.cluster.host.processes import Processes
from tests.cluster.programs.binaries import binary

HOST: Final = "127.0.0.1"


@dataclass(frozen=True)
class Toxiproxy:
    """One way to one server, spoiled or not."""

    api: str
    address: str
    """HOST:PORT that clients use instead of the server's."""

    def add_toxic(self, kind: str, attributes: dict[str, int], share: float = 1.0, stream: str = "downstream") -> None:
        """Add a toxic to a share of the connections that are made from now on."""
        toxic = {"name": kind, "type": kind, "stream": stream, "toxicity": share, "attributes": attributes}
        self._post("/proxies/way/toxics", toxic)

    def reset(self) -> None:
        """Remove every toxic."""
        self._post("/reset", {})

    def _post(self, path: str, body: dict[str, Any]) -> None:
        request = urllib.request.Request(f"{self.api}{path}", json.dumps(body).encode(), method="POST")
        with urllib.request.urlopen(request, timeout=10):
            pass


def start_toxiproxy(upstream: str, processes: Processes) -> Toxiproxy:
    """Put a proxy before a server's HOST:PORT."""
    api, way = free_ports(2)
    processes.start("toxiproxy", [binary("toxiproxy"), "-host", HOST, "-port", str(api)], {"LOG_LEVEL": "error"})
    processes.wait_for_port("toxiproxy", HOST, api)
    proxy = Toxiproxy(f"http://{HOST}:{api}", f"{HOST}:{way}")
    proxy._post("/proxies", {"name": "way", "listen": proxy.address, "upstream": upstream, "enabled": True})
    return proxy
