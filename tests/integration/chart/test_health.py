"""What `helm test` runs, run here against an operator that is well, is not, or is not there."""

import http.server
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.cluster.host.addresses import free_ports
from tests.integration.chart.rendering import NAMESPACE, RELEASE, render


@contextmanager
def answering(status: int, text: str) -> Iterator[int]:
    """A health endpoint; the port it listens on."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/healthz" else 404)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            """Tell nobody."""

    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def run_test(port: int, patience: int = 60) -> subprocess.CompletedProcess[str]:
    """Run the container's command, with the operator's Service on this machine."""
    [pod] = [manifest for manifest in render({}) if manifest["kind"] == "Pod"]
    [container] = pod["spec"]["containers"]
    assert container["command"] == ["python3", "-c"]
    [script] = container["args"]
    assert f"http://{RELEASE}.{NAMESPACE}.svc:8081/healthz" in script
    here = re.sub(r"http://\S+:8081", f"http://127.0.0.1:{port}", script).replace("+ 60", f"+ {patience}")
    return subprocess.run([sys.executable, "-c", here], capture_output=True, text=True, timeout=60, check=False)


def test_helm_test_healthy_operator_passes() -> None:
    with answering(200, "ok") as port:
        result = run_test(port)
    assert (result.returncode, result.stdout.split()[-1]) == (0, "ok")


@pytest.mark.parametrize("ailment", ["a worker has stopped", "the work queue is stuck for 301 seconds"])
def test_helm_test_unhealthy_operator_fails_with_reason(ailment: str) -> None:
    with answering(500, ailment) as port:
        result = run_test(port)
    assert result.returncode == 1
    assert f"the operator is unhealthy: {ailment}" in result.stderr


def test_helm_test_without_leader_fails() -> None:
    result = run_test(*free_ports(1), patience=1)
    assert result.returncode == 1
    assert "no replica is the leader" in result.stderr
