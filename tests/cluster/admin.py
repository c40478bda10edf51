"""A direct client of the API server, for thousands of small requests: kubectl would be a new process for each."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from kubernetes import config

MERGE: Final = "application/merge-patch+json"
SECONDS: Final = 60
"""For one answer."""


class ApiRefusedError(Exception):
    """The API server did not do it; the message is its sentence."""


class Admin:
    """Speaks to the API server with the rights of a kubeconfig, from any thread."""

    def __init__(self, kubeconfig: Path) -> None:
        self._api = config.new_client_from_config(str(kubeconfig))

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        content_type: str = "application/json",
        query: Mapping[str, str] | None = None,
    ) -> tuple[int, dict[str, Any]]:
        """Return the status code and the answer."""
        call = self._api.param_serialize(
            method,
            path,
            query_params=list((query or {}).items()),
            header_params={"Accept": "application/json", "Content-Type": content_type},
            body=body,
            auth_settings=["BearerToken"],
        )
        response = self._api.call_api(*call, _request_timeout=SECONDS)
        return response.status, json.loads(response.read())

    def get(self, path: str, selector: str = "") -> dict[str, Any]:
        """Return an object, or a list of those that a label selector chooses."""
        code, answer = self.request("GET", path, query={"labelSelector": selector} if selector else None)
        if code != 200:
            raise ApiRefusedError(f"GET {path}: {code} {answer.get('message', '')}")
        return answer

    def items(self, path: str, selector: str = "") -> list[dict[str, Any]]:
        """Return everything of a list; the API server says only once of what kind it is."""
        found = self.get(path, selector)
        kind = {"apiVersion": found["apiVersion"], "kind": found["kind"].removesuffix("List")}
        return [{**kind, **item} for item in found["items"]]

    def create(self, path: str, manifest: dict[str, Any]) -> None:
        """Create an object; a field that the API server does not know is refused, as kubectl has it refused."""
        code, answer = self.request("POST", path, manifest, query={"fieldValidation": "Strict"})
        if code != 201:
            raise ApiRefusedError(f"POST {path}: {code} {answer.get('message', '')}")

    def delete(self, path: str) -> None:
        """Begin to delete an object."""
        code, answer = self.request("DELETE", path)
        if code not in {200, 202}:
            raise ApiRefusedError(f"DELETE {path}: {code} {answer.get('message', '')}")

    def patch_status(self, path: str, status: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Write a part of an object's status."""
        return self.request("PATCH", f"{path}/status", {"status": status}, MERGE)
