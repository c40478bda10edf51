"""One way to call the API server: a path and a body in, JSON or one of three errors out."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from time import perf_counter
from typing import Any, Final, NamedTuple

import aiohttp
from kubernetes.aio import client, config

from qlora_operator.cluster.interface import ClusterBusyError

REQUEST_SECONDS: Final = 30
"""Longest time for one call; a slower API server is as good as away."""
MERGE_PATCH: Final = "application/merge-patch+json"
"""Patches are merged, not applied: the client sends an applied patch as JSON, which the API server reads as YAML, and
YAML knows no pairs of surrogates, so that an emoji in a manifest would be refused."""
UNAUTHORIZED: Final = 401
TOO_MANY_REQUESTS: Final = 429
MAX_RETRY_AFTER: Final = 60.0
"""Seconds that one Retry-After may hold everything up."""
MAX_TRIES: Final = 5
"""Calls that one request may take, each after the pause that the answer before asked for. A pass makes several writes:
if it gave up at the first refusal, its back-off would grow with each, and hold a run up for minutes."""
_RETRYABLE_STATUSES: Final = frozenset({UNAUTHORIZED, 408, TOO_MANY_REQUESTS, 500, 502, 503, 504})
"""What passes; an expired token among it, because the kubelet writes a new one."""


class ApiError(Exception):
    """The API server understood and refused."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason


class NotFoundError(ApiError):
    """The object, or its kind, does not exist."""


class ConflictError(ApiError):
    """It exists already, or has changed since it was read."""


async def load_configuration(kubeconfig: str) -> client.Configuration:
    """Find the API server: a named kubeconfig, the pod's own account, or the user's kubeconfig."""
    configuration = client.Configuration()
    # Otherwise every call reads ~/.netrc and the proxies of the environment, which kopf's watches do not heed either;
    # a proxy-url of the kubeconfig counts.
    configuration.client_session_kwargs = {"trust_env": False}
    await read_credentials(configuration, kubeconfig)
    return configuration


async def read_credentials(configuration: client.Configuration, kubeconfig: str) -> None:
    """Read the file anew: a token that is refused has a successor there."""
    if kubeconfig:
        await config.load_kube_config(kubeconfig, client_configuration=configuration)
        return
    try:
        config.load_incluster_config(client_configuration=configuration)
    except config.ConfigException:
        await config.load_kube_config(client_configuration=configuration)


async def _no_renewal() -> None:
    """Have nothing to read anew."""


OnCall = Callable[[str, int | None, float], None]
"""Called after each call with its verb, the HTTP status or None, and the seconds that it took."""


def _ignore_call(_: str, __: int | None, ___: float) -> None:
    """Have nobody who wants to know."""


OnServerDate = Callable[[str, float], None]
"""Called with the header Date of each answer, and the seconds that it took."""


def _ignore_date(_: str, __: float) -> None:
    """Have nobody who wants to know the time."""


class Response(NamedTuple):
    """What came back from one call."""

    status: int
    """Of HTTP."""
    retry_after: str
    """How many seconds to wait, if that is said."""
    text: bytes


class Api:
    """A connection to the API server."""

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
        """Make a call, once more after each pause that an overloaded API server asks for, and return its JSON."""
        for _ in range(MAX_TRIES):
            answer = await self._call(method, path, body, query, content_type)
            if not await self._honor_retry_after(answer):
                break
        return _parse_response(answer)

    async def _call(
        self, method: str, path: str, body: Mapping[str, Any] | None, query: Mapping[str, str] | None, content_type: str
    ) -> Response:
        await asyncio.sleep(self._paused_until - asyncio.get_running_loop().time())
        if method != "GET" and not self._may_write():
            raise ClusterBusyError("this replica no longer leads, and writes nothing")
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
        self._on_server_date(response.headers.get("Date", ""), took)
        return Response(response.status, response.headers.get("Retry-After", ""), text)

    async def _honor_retry_after(self, answer: Response) -> bool:
        """Keep quiet as long as an overloaded API server asks, and say so; read a token anew that it refuses."""
        if answer.status == UNAUTHORIZED:
            await self._renew_credentials()
        if answer.status != TOO_MANY_REQUESTS or not answer.retry_after.isdecimal():
            return False
        quiet = min(float(answer.retry_after), MAX_RETRY_AFTER)
        self._paused_until = asyncio.get_running_loop().time() + quiet
        return True


def _parse_response(answer: Response) -> dict[str, Any]:
    try:
        told = json.loads(answer.text)
    except ValueError:
        told = {"message": answer.text[:200].decode(errors="replace")}
    if answer.status < 400:
        return dict(told)
    message = f"{answer.status} {told.get('reason', '')}: {told.get('message', '')}"
    if answer.status in _RETRYABLE_STATUSES:
        raise ClusterBusyError(message)
    kind = {404: NotFoundError, 409: ConflictError}.get(answer.status, ApiError)
    raise kind(answer.status, told.get("reason", ""), message)
