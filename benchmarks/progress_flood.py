"""How much a flood of the progress endpoint slows the operator's own calls: `python -m benchmarks.progress_flood`.

The API server is that of QLORA_TEST_KUBECONFIG, or else a stub on loopback whose TokenReviews are slow. Clients, stub
and operator are one process each. Without a flood another process is as busy as the clients, so that the ratio does not
depend on the number of processors.
"""

import argparse
import asyncio
import base64
import json
import multiprocessing
import os
import resource
import socket
import time
from collections.abc import Callable
from datetime import UTC, datetime
from statistics import median, quantiles
from typing import Final

from aiohttp import web
from kubernetes.aio import client

from qlora_api import names
from qlora_api.job_ref import JobRef
from qlora_operator.cluster.cache import ChildCache
from qlora_operator.cluster.http import Api, load_configuration
from qlora_operator.cluster.kube_cluster import KubeCluster
from qlora_operator.progress_server import PodAuthorizer, ProgressEndpoint, ProgressServer, ReportStore

REF: Final = JobRef("default", "support-bot")
ADDRESSES: Final = 250
"""Loopback addresses that the clients connect from, as from as many pods."""
PAUSE_SECONDS: Final = 0.01
"""Pause between two calls of the operator."""


def make_token(number: int) -> str:
    """Return a token that only the API server can tell from a pod's."""
    pod = {"name": "support-bot-1-0-abcde", "uid": f"uid-{number}"}
    claims = {
        "aud": [names.TOKEN_AUDIENCE], "iss": "https://kubernetes.default.svc", "exp": time.time() + 3600,
        "kubernetes.io": {"namespace": REF.namespace, "pod": pod},
    }  # fmt: skip
    parts = [json.dumps(part).encode() for part in ({"alg": "RS256", "kid": "any"}, claims)]
    return ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in (*parts, b"forged"))


TOKENS: Final[dict[str, Callable[[int], str]]] = {
    "no token": lambda _: "",
    "random tokens": lambda number: f"random{number}",
    "forged tokens": make_token,
}


def main() -> None:
    """Measure the calls of a quiet operator, then those during each flood, and print the ratios."""
    parser = argparse.ArgumentParser(prog="benchmarks.progress_flood", description=__doc__)
    parser.add_argument("--clients", type=int, default=2_000)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--review-seconds", type=float, default=3.0, help="that the stub takes for a TokenReview")
    asyncio.run(measure_all(parser.parse_args()))


async def measure_all(options: argparse.Namespace) -> None:
    """Measure with and without each flood."""
    stub, configuration = await open_api_server(options.review_seconds)
    api, review_api = Api(configuration), Api(configuration)
    server = await start_server(review_api)
    busy = start_process(spin)
    await asyncio.sleep(1)
    quiet = await measure(api, options.seconds)
    busy.kill()
    print(f"{'quiet':15} median {median(quiet) * 1e3:6.2f} ms  p95 {p95(quiet) * 1e3:6.2f} ms", flush=True)
    for name in TOKENS:
        flood = start_process(run_flood, name, server.port, options.clients, options.seconds + 1)
        await asyncio.sleep(1)
        calls = await measure(api, options.seconds)
        print(
            f"{name:15} median {median(calls) * 1e3:6.2f} ms  p95 {p95(calls) * 1e3:6.2f} ms  "
            f"ratio {median(calls) / median(quiet):.2f} (p95 {p95(calls) / p95(quiet):.2f})",
            flush=True,
        )
        await asyncio.to_thread(flood.join)
    await server.cleanup()
    await api.close()
    await review_api.close()
    if stub is not None:
        stub.kill()


def p95(values: list[float]) -> float:
    """Return the 95th percentile."""
    return quantiles(values, n=20)[-1]


async def open_api_server(review_seconds: float) -> tuple[multiprocessing.Process | None, client.Configuration]:
    """Return the stub's process, if there is one, and how to reach the API server."""
    if kubeconfig := os.environ.get("QLORA_TEST_KUBECONFIG"):
        return None, await load_configuration(kubeconfig)
    listener = socket.create_server(("127.0.0.1", 0))
    configuration = client.Configuration()
    configuration.host = f"http://127.0.0.1:{listener.getsockname()[1]}"
    return start_process(run_stub, listener, review_seconds), configuration


async def start_server(review_api: Api) -> ProgressServer:
    """Start the progress server as the operator does."""
    reviewer = KubeCluster(review_api, ChildCache())
    authorizer = PodAuthorizer(reviewer, asyncio.get_running_loop().time, now)
    endpoint = ProgressEndpoint(authorizer, ReportStore(), lambda _, __: None, now)
    server = ProgressServer(endpoint.application(), 0)
    await server.start()
    return server


def now() -> datetime:
    """Return the time."""
    return datetime.now(UTC)


async def measure(api: Api, seconds: float) -> list[float]:
    """Return how long each call of the operator took, in seconds."""
    took: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        await api.request("GET", "/api/v1/namespaces/default")
        took.append(time.perf_counter() - start)
        await asyncio.sleep(PAUSE_SECONDS)
    return took


def start_process(target: Callable[..., None], *args: object) -> multiprocessing.Process:
    """Start a process that ends with this one."""
    process = multiprocessing.Process(target=target, args=args, daemon=True)
    process.start()
    return process


def spin() -> None:
    """Use one processor."""
    while True:
        pass


def run_stub(listener: socket.socket, review_seconds: float) -> None:
    """Answer as an API server whose TokenReviews are slow."""

    async def answer(request: web.Request) -> web.Response:
        if request.path.endswith("/tokenreviews"):
            await asyncio.sleep(review_seconds)
        return web.json_response({"metadata": {"name": "default"}, "status": {}})

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    web.run_app(app, sock=listener, access_log=None, print=None)


def run_flood(kind: str, port: int, clients: int, seconds: float) -> None:
    """Post as fast as it goes from many clients, each with a new connection and a new token for each post."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    asyncio.run(flood(TOKENS[kind], port, clients, seconds))


async def flood(make: Callable[[int], str], port: int, clients: int, seconds: float) -> None:
    """Run the clients."""
    end = time.perf_counter() + seconds
    await asyncio.gather(*(post_until(end, make, port, number, clients) for number in range(clients)))


async def post_until(end: float, make: Callable[[int], str], port: int, number: int, clients: int) -> None:
    """Post until the end; a connection that is refused or cut off is tried again at once."""
    address = f"127.0.1.{1 + number % ADDRESSES}"
    while time.perf_counter() < end:
        number += clients
        request = (
            f"POST {names.progress_path(*REF)} HTTP/1.1\r\nHost: operator\r\n"
            f"Authorization: Bearer {make(number)}\r\nContent-Length: 2\r\n\r\n{{}}"
        )
        try:
            async with asyncio.timeout(max(end - time.perf_counter(), 0.01)):
                reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(address, 0))
                writer.write(request.encode())
                await reader.read()
                writer.close()
        except OSError:  # also a timeout
            await asyncio.sleep(0)


if __name__ == "__main__":
    main()
