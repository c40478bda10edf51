"""ClusterClient on the official Kubernetes client; imported late, because importing that client takes a second."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Never

import urllib3
import yaml
from kubernetes import client, config
from kubernetes.config.config_exception import ConfigException

from qlora_api import names
from qlora_api.escapes import shell_command
from qlora_api.job_ref import JobRef
from qlora_api.units import MIB
from qlora_cli.cluster.client import AlreadyExistsError, ClusterError, KubeObject, NotFoundError, UnreachableError

CONNECT_SECONDS: Final = 10
READ_SECONDS: Final = 30
PAGE_SIZE: Final = 500
"""Objects per page of a list request."""
MAX_LINE_BYTES: Final = MIB
"""Longest line of a log that is kept together: a process may write one without an end."""
MERGE_PATCH: Final = "application/merge-patch+json"
_RETRYABLE_STATUSES: Final = frozenset({429, 500, 502, 503, 504})
_IN_POD: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_NO_KUBECONFIG: Final = (
    "no cluster is configured: {error}; set KUBECONFIG or pass --kubeconfig. Without a cluster, qlora run trains on "
    "this machine, and report and serve-snippet take the folder of a result"
)


def connect(kubeconfig: str | None, context: str | None) -> tuple["KubeClient", str]:
    """Connect to the cluster of a kubeconfig, or to that of the pod this runs in.

    Returns:
        The client, and the namespace of the context or pod.

    Raises:
        ClusterError: There is no usable kubeconfig.

    """
    configuration = client.Configuration()
    # No retries here: commands that wait retry themselves, and all others should fail fast.
    configuration.retries = False
    try:
        namespace = _configure(configuration, kubeconfig, context)
    except ConfigException as error:
        raise ClusterError(_NO_KUBECONFIG.format(error=str(error).rstrip("."))) from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ClusterError(f"cannot read {kubeconfig or 'the kubeconfig'}: {error}") from error
    return KubeClient(client.ApiClient(configuration)), namespace


def _configure(configuration: Any, kubeconfig: str | None, context: str | None) -> str:
    if not (kubeconfig or context or os.environ.get("KUBECONFIG")) and _IN_POD.is_file():
        config.load_incluster_config(client_configuration=configuration)
        return _IN_POD.read_text(encoding="utf-8").strip()
    config.load_kube_config(kubeconfig, context=context, client_configuration=configuration)
    contexts, active = config.list_kube_config_contexts(kubeconfig)
    chosen = next((found for found in contexts if found["name"] == context), active)
    return str(chosen["context"].get("namespace") or "default")


class KubeClient:
    """A client of one API server."""

    def __init__(self, api: Any) -> None:
        self._api = api

    def get(self, ref: JobRef) -> KubeObject:
        """Return a QLoRAJob."""
        return self._call("GET", _object_path(ref))

    def list_jobs(self, namespace: str, selector: str = "") -> list[KubeObject]:
        """Return the QLoRAJobs of a namespace, or of all namespaces if it is empty."""
        return self._pages(_collection_path(namespace), {"labelSelector": selector} if selector else {})

    def create(self, manifest: KubeObject, *, dry_run: bool = False) -> KubeObject:
        """Create a QLoRAJob."""
        query = {"fieldManager": "qlora", "fieldValidation": "Strict"} | ({"dryRun": "All"} if dry_run else {})
        return self._call("POST", _collection_path(manifest["metadata"]["namespace"]), query, manifest)

    def patch(self, ref: JobRef, change: KubeObject) -> KubeObject:
        """Apply a JSON merge patch to a QLoRAJob."""
        return self._call("PATCH", _object_path(ref), {"fieldManager": "qlora"}, change, MERGE_PATCH)

    def delete(self, ref: JobRef, uid: str) -> None:
        """Start to delete a QLoRAJob after its children, if it still has this uid."""
        self._call("DELETE", _object_path(ref), {}, {"propagationPolicy": "Foreground", "preconditions": {"uid": uid}})

    def events(self, namespace: str) -> list[KubeObject]:
        """Return the Events of a namespace."""
        return self._pages(f"/api/v1/namespaces/{namespace}/events", {})

    def pods(self, ref: JobRef) -> list[KubeObject]:
        """Return the pods of a QLoRAJob."""
        return self._pages(
            f"/api/v1/namespaces/{ref.namespace}/pods", {"labelSelector": f"{names.JOB_LABEL}={ref.name}"}
        )

    def log(self, namespace: str, pod: str, query: Mapping[str, str]) -> Iterator[str]:
        """Yield the lines of a pod's log as they come."""
        path = f"/api/v1/namespaces/{namespace}/pods/{pod}/log"
        response = self._send("GET", path, {"container": names.CONTAINER, **query}, None, "", None)
        if response.status >= 400:
            _raise_for_status(response.status, response.read(), path)
        yield from _lines(response.response)

    def _pages(self, path: str, query: Mapping[str, str]) -> list[KubeObject]:
        items: list[KubeObject] = []
        token = ""
        while True:
            page = self._call("GET", path, {**query, "limit": str(PAGE_SIZE)} | ({"continue": token} if token else {}))
            items += page["items"]
            token = page["metadata"].get("continue", "")
            if not token:
                return items

    def _call(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: KubeObject | None = None,
        content_type: str = "application/json",
    ) -> dict[str, Any]:
        response = self._send(method, path, query or {}, body, content_type, READ_SECONDS)
        text = response.read()
        if response.status >= 400:
            _raise_for_status(response.status, text, path)
        return dict(json.loads(text))

    def _send(  # noqa: PLR0913, PLR0917 (the parts of an HTTP request)
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        body: KubeObject | None,
        content_type: str,
        read_seconds: float | None,
    ) -> Any:
        headers = {"Accept": "application/json, */*"} | ({"Content-Type": content_type} if content_type else {})
        call = self._api.param_serialize(
            method,
            path,
            query_params=list(query.items()),
            header_params=headers,
            body=body,
            auth_settings=["BearerToken"],
        )
        try:
            return self._api.call_api(*call, _request_timeout=(CONNECT_SECONDS, read_seconds))
        except (urllib3.exceptions.HTTPError, OSError) as error:
            host = self._api.configuration.host
            raise UnreachableError(
                f"the API server at {host} does not respond: {_cause(error)}; "
                "check the network or VPN, or choose another cluster with --context"
            ) from error


def _collection_path(namespace: str) -> str:
    scope = f"namespaces/{namespace}/" if namespace else ""
    return f"/apis/{names.API_VERSION}/{scope}{names.PLURAL}"


def _object_path(ref: JobRef) -> str:
    return f"{_collection_path(ref.namespace)}/{ref.name}"


def _lines(response: Any) -> Iterator[str]:
    rest = b""
    try:
        for chunk in response.stream(1 << 16):
            *lines, rest = (rest + chunk).split(b"\n")
            yield from (line.decode(errors="replace") for line in lines)
            if len(rest) > MAX_LINE_BYTES:
                yield rest.decode(errors="replace")
                rest = b""
    except urllib3.exceptions.HTTPError as error:
        raise UnreachableError(f"the log stream was interrupted: {_cause(error)}") from error
    if rest:
        yield rest.decode(errors="replace")


def _cause(error: BaseException) -> str:
    """Return the innermost cause, without the addresses of Python objects."""
    reason = getattr(error, "reason", None) or error
    return str(reason).rpartition(">: ")[2] or type(reason).__name__


def _raise_for_status(status: int, text: bytes, path: str) -> Never:
    """Raise a ClusterError with the cause and the fix for an error response of the API server."""
    try:
        response = json.loads(text)
        message, reason = str(response["message"]), str(response.get("reason", ""))
    except (ValueError, KeyError, TypeError):
        message, reason = text.decode(errors="replace").strip(), ""
    if status == 404 and not reason:
        raise ClusterError(
            f"the cluster has no CRD {names.PLURAL}.{names.GROUP}; install the chart qlora-operator, or the CRD "
            "with kubectl apply --server-side -f crds/qlorajobs.qlora.dev.yaml"
        )
    if status == 404:
        raise NotFoundError(_missing(message, path))
    if status == 409 and reason == "AlreadyExists":
        raise AlreadyExistsError(message)
    if status == 401:
        raise ClusterError("the API server rejects these credentials; log in again, or choose another --context")
    if status == 403:
        raise ClusterError(
            f"{message}; ask the cluster's administrator for this permission (kubectl auth can-i --list)"
        )
    if status in _RETRYABLE_STATUSES:
        raise UnreachableError(f"the API server is busy ({status}): {message}")
    raise ClusterError(message)


def _missing(message: str, path: str) -> str:
    """Add the namespace to a NotFound message, and how to find what exists."""
    namespace = path.partition("/namespaces/")[2].partition("/")[0]
    if message.startswith("namespaces "):
        return f"{message}; create it with {shell_command('kubectl', 'create', 'namespace', namespace)}"
    return f"{message} in namespace {namespace}; qlora list --all-namespaces shows what exists"
