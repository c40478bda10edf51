"""The API server, asked directly: thousands of small questions, for which kubectl would take minutes."""

import base64
import http.client
import json
import ssl
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from tests.cluster.cluster import Cluster


class Admin:
    """One connection with an administrator's certificate."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        config = yaml.safe_load(cluster.kubeconfig.read_text())
        user, server = config["users"][0]["user"], config["clusters"][0]["cluster"]
        pair = folder / "admin.pem"
        pair.write_bytes(b"".join(base64.b64decode(user[f"client-{part}-data"]) for part in ("key", "certificate")))
        trust = ssl.create_default_context(cadata=base64.b64decode(server["certificate-authority-data"]).decode())
        trust.load_cert_chain(pair)
        url = urlsplit(server["server"])
        self._connection = http.client.HTTPSConnection(url.hostname or "", url.port, context=trust, timeout=60)

    def close(self) -> None:
        """Hang up."""
        self._connection.close()

    def ask(
        self, method: str, path: str, body: Any = None, content_type: str = "application/json"
    ) -> tuple[int, dict[str, Any]]:
        """Return the status code and the answer."""
        payload = None if body is None else json.dumps(body)
        self._connection.request(method, path, payload, {"Content-Type": content_type})
        answer = self._connection.getresponse()
        return answer.status, json.loads(answer.read())

    def items(self, path: str) -> list[dict[str, Any]]:
        """Return everything of a list."""
        return list(self.ask("GET", path)[1]["items"])

    def patch_status(self, path: str, status: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Write a part of an object's status."""
        return self.ask("PATCH", f"{path}/status", {"status": status}, "application/merge-patch+json")
