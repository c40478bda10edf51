"""A kubelet that serves logs and nothing else: the API server asks it as it would ask a real one."""

import json
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from tests.cluster.host.commands import run
from tests.integration.operator_process import JobNamespace


class LogServer(ThreadingHTTPServer):
    """Has the lines of each pod; a reader that follows gets those that come until the pod has ended."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.lines: dict[str, list[str]] = {}
        self.ended: set[str] = set()
        self.readers: list[str] = []

    def stream(self, pod: str, tail: int | None, follow: bool) -> Iterator[str]:
        """Yield the lines that somebody reads."""
        self.readers.append(pod)
        written = self.lines.get(pod, [])
        shown = len(written) if follow else 0
        yield from written if tail is None else written[len(written) - tail :]
        while follow and not (pod in self.ended and shown == len(written)):
            yield from written[shown:]
            shown = len(written)
            time.sleep(0.05)


class _Handler(BaseHTTPRequestHandler):
    server: LogServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = parse_qs(url.query)
        _, kind, _, pod, _ = url.path.split("/")
        assert kind == "containerLogs"
        tail = int(query["tailLines"][0]) if "tailLines" in query else None
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for line in self.server.stream(pod, tail, query.get("follow") == ["true"]):
            data = f"{line}\n".encode()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
            self.wfile.flush()
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base class's name)
        """Keep quiet."""


@contextmanager
def serve_logs(namespace: JobNamespace, node: str, folder: Path) -> Iterator[LogServer]:
    """Register a node whose kubelet is a LogServer; nothing is scheduled to it."""
    key, certificate = folder / "kubelet.key", folder / "kubelet.crt"
    run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=kubelet",
         "-keyout", key, "-out", certificate]
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = LogServer()
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    status = {
        "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
        "daemonEndpoints": {"kubeletEndpoint": {"Port": server.server_port}},
    }
    manifest = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": node}, "spec": {"unschedulable": True}}
    namespace.cluster.kubectl("create", "--filename=-", stdin=json.dumps(manifest))
    patch = json.dumps({"status": status})
    namespace.cluster.kubectl("patch", "node", node, "--subresource=status", "--type=merge", f"--patch={patch}")
    try:
        yield server
    finally:
        namespace.cluster.kubectl("delete", "node", node)
        server.shutdown()
        server.server_close()
