"""HTTP client of the API server: path and body in; JSON, ApiError or ClusterBusyError out."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from time import perf_counter
from typing import Any, Final, NamedTuple

import aiohttp
from kubernetes.aio import client, config

from qlora_operator.cluster.interface import ClusterBusyError

REQUEST_SECONDS: Final = 30
"""Timeout of one call in seconds; a slower API server counts as unavailable."""
MERGE_PATCH: Final = "application/merge-patch+json"
"""Merge patches, not server-side apply: the client sends an apply patch as JSON, which the API server parses as YAML,
and YAML has no surrogate pairs, so an emoji in a manifest would be rejected."""
REDIRECT: Final = 300
"""The first HTTP status that is no success."""
UNAUTHORIZED: Final = 401
TOO_MANY_REQUESTS: Final = 429
MAX_RETRY_AFTER: Final = 60.0
"""Longest pause in seconds that is honored for one Retry-After."""
MAX_TRIES: Final = 5
"""Calls of one request, each after the pause that the previous response asked for. A reconcile makes several writes: if
it gave up at the first 429, its back-off would grow with each and delay a run for minutes."""
_RETRYABLE_STATUSES: Final = frozenset({UNAUTHORIZED, 408, TOO_MANY_REQUESTS, 500, 502, 503, 504})
"""Transient statuses; 401 is one of them, because the kubelet replaces an expired token."""


_FAILED_WEBHOOK: Final = "failed calling webhook"
"""What the API server says, with status 500, of an admission webhook that does not answer: until somebody mends it."""


class FailedWebhookError(ClusterBusyError):
    """An admission webhook does not answer, so the API server writes nothing that the webhook is for."""


class ApiError(Exception):
    """The API server rejected a request."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason


class NotFoundError(ApiError):
    """The object or its kind does not exist (404)."""


class ConflictError(ApiError):
    """The object already exists, or has changed since it was read (409)."""


async def load_configuration(kubeconfig: str) -> client.Configuration:
    """Load the client configuration: the given kubeconfig, the pod's service account, or the default kubeconfig."""
    configuration = client.Configuration()
    # Otherwise every call reads ~/.netrc and the proxy variables, which kopf's watches ignore; proxy-url in the
    # kubeconfig still applies.
    configuration.client_session_kwargs = {"trust_env": False}
    await read_credentials(configuration, kubeconfig)
    return configuration


async def read_credentials(configuration: client.Configuration, kubeconfig: str) -> None:
    """Reload the credentials from disk, where a rejected token has been replaced."""
    if kubeconfig:
        await config.load_kube_config(kubeconfig, client_configuration=configuration)
        return
    try:
        config.load_incluster_config(client_configuration=configuration)
    except config.ConfigException:
        await config.load_kube_config(client_configuration=configuration)


async def _no_renewal() -> None:
    """Do nothing: there are no credentials to reload."""


OnCall = Callable[[str, int | None, float], None]
"""Called after each call with its verb, the HTTP status (None without a response), and its duration in seconds."""


def _ignore_call(_: str, __: int | None, ___: float) -> None:
    """Ignore the call."""


OnServerDate = Callable[[str, float], None]
"""Called with the Date header of each successful response, and the duration of the call in seconds."""


def _ignore_date(_: str, __: float) -> None:
    """Ignore the date."""


class Response(NamedTuple):
    """The response to one call."""

    status: int
    """HTTP status code."""
    retry_after: str
    """Value of the Retry-After header; empty without one."""
    text: bytes


class Api:
    """A client of the API server."""

    def __init__(
        self,
        configuration: client.Configuration,
        may_write: Callable[[], bool] = lambda: True,
        renew_credentials: Callable[[], Awaitable[None]] = _no_renewal,
        on_call: OnCall = _ignore_call,
        on_server_date: OnServerDate = _ignore_date,
    ) -> None:
        self._client = client.ApiClient(configuration)
        self._may_write = may_write
        self._renew_credentials = renew_credentials
        self._on_call = on_call
        self._on_server_date = on_server_date
        self._paused_until = 0.0

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def request(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        query: Mapping[str, str] | None = None,
        content_type: str = "application/json",
    ) -> dict[str, Any]:
        """Make a request and return its JSON, retrying after each Retry-After pause of an overloaded API server.

        Raises:
            ClusterBusyError: This replica is not the leader, or the API server is unavailable or overloaded.
            NotFoundError: The object or its kind does not exist.
            ConflictError: The object already exists, or has changed since it was read.
            ApiError: Any other rejection.

        """
        for _ in range(MAX_TRIES):
            response = await self._call(method, path, body, query, content_type)
            if not await self._honor_retry_after(response):
                break
        return _parse_response(response)

    async def _call(
        self, method: str, path: str, body: Mapping[str, Any] | None, query: Mapping[str, str] | None, content_type: str
    ) -> Response:
        await asyncio.sleep(self._paused_until - asyncio.get_running_loop().time())
        if method != "GET" and not self._may_write():
            raise ClusterBusyError("not the leader: write refused")
        call = await self._client.param_serialize(
            method,
            path,
            query_params=list((query or {}).items()),
            header_params={"Accept": "application/json", "Content-Type": content_type},
            body=body,
            auth_settings=["BearerToken"],
        )
        start, status = perf_counter(), None
        try:
            response = await self._client.call_api(*call, _request_timeout=aiohttp.ClientTimeout(REQUEST_SECONDS))
            text = await response.read()
            status = response.status
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise ClusterBusyError(f"the API server does not answer: {error!r}") from error
        finally:
            took = perf_counter() - start
            self._on_call(method, status, took)
        if response.status < REDIRECT:  # an error may be a load balancer's, whose clock counts for nothing
            self._on_server_date(response.headers.get("Date", ""), took)
        return Response(response.status, response.headers.get("Retry-After", ""), text)

    async def _honor_retry_after(self, response: Response) -> bool:
        """Schedule the pause that a 429 asks for, and return whether to retry; reload the credentials after a 401."""
        if response.status == UNAUTHORIZED:
            await self._renew_credentials()
        if response.status != TOO_MANY_REQUESTS or not response.retry_after.isdecimal():
            return False
        pause = min(float(response.retry_after), MAX_RETRY_AFTER)
        self._paused_until = asyncio.get_running_loop().time() + pause
        return True


def _parse_response(response: Response) -> dict[str, Any]:
    body = _read_object(response.text)
    if response.status < 400:
        if body is None:  # the page of a proxy, say
            raise ClusterBusyError(f"the answer is no JSON object: {response.text[:200].decode(errors='replace')}")
        return body
    if body is None:
        body = {"message": response.text[:200].decode(errors="replace")}
    message = f"{response.status} {body.get('reason', '')}: {body.get('message', '')}"
    if response.status in _RETRYABLE_STATUSES:
        raise FailedWebhookError(message) if _FAILED_WEBHOOK in message else ClusterBusyError(message)
    error = {404: NotFoundError, 409: ConflictError}.get(response.status, ApiError)
    raise error(response.status, body.get("reason", ""), message)


def _read_object(text: bytes) -> dict[str, Any] | None:
    try:
        body = json.loads(text)
    except (RecursionError, ValueError):
        return None
    return body if isinstance(body, dict) else None
