"""The node that the other tests of this folder stand on runs pods as a production cluster would."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.node.images import build_image

NAMESPACE = "node-test"

DOCKERFILE = """\
ARG BASE=python:3.12-slim-bookworm
FROM ${BASE} AS probe
COPY probe.py /probe.py
USER 65532:65532
ENTRYPOINT ["python3", "/probe.py"]
"""

PROBE = """\
import os
import socket
import time
import urllib.error
import urllib.request

def answer(url):
    # DNS and Services learn of a new pod a moment after it is Ready, on every cluster.
    for _ in range(20):
        try:
            return urllib.request.urlopen(url, timeout=5).read().decode()
        except urllib.error.HTTPError as refusal:
            return refusal.code
        except OSError as reason:
            time.sleep(0.5)
    return reason

print("port", answer("http://echo:8080/"))
print("service", socket.gethostbyname("echo.node-test.svc.cluster.local"))
print("s3", answer(os.environ["AWS_ENDPOINT_URL"]))
"""

ECHO = """\
import http.server

class Echo(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"answered")

http.server.HTTPServer(("", 8080), Echo).serve_forever()
"""


@pytest.fixture(scope="module")
def image(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small image that is built and brought to the node in the way of the repository's own."""
    context: Path = tmp_path_factory.mktemp("image")
    (context / "Dockerfile").write_text(DOCKERFILE)
    (context / "probe.py").write_text(PROBE)
    return cluster.load_image(build_image("probe", "node-probe:test", context=context))


@pytest.fixture(scope="module")
def namespace(cluster: Cluster) -> Iterator[str]:
    """A namespace that enforces the restricted Pod Security profile."""
    cluster.create_namespace(NAMESPACE)
    cluster.kubectl("wait", "--for=create", f"--namespace={NAMESPACE}", "serviceaccount", "default")
    yield NAMESPACE
    cluster.kubectl("delete", "namespace", NAMESPACE)


def build_pod(name: str, image: str, **container: Any) -> dict[str, Any]:
    security = {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "runAsNonRoot": True,
        "readOnlyRootFilesystem": True,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    main = {"name": "main", "image": image, "imagePullPolicy": "Never", "securityContext": security, **container}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": NAMESPACE, "labels": {"app": name}},
        "spec": {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 1,
            "automountServiceAccountToken": False,
            "containers": [main],
        },
    }


def build_service(name: str, port: int) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {"selector": {"app": name}, "ports": [{"port": port}]},
    }


def test_a_restricted_pod_reaches_services_and_s3(cluster: Cluster, namespace: str, image: str) -> None:
    probe = {"httpGet": {"path": "/", "port": 8080}, "periodSeconds": 1}
    cluster.apply(build_pod("echo", image, command=["python3", "-c", ECHO], readinessProbe=probe))
    cluster.apply(build_service("echo", 8080))
    cluster.kubectl("wait", "--for=condition=Ready", f"--namespace={namespace}", "pod/echo", "--timeout=60s")

    environment = [{"name": name, "value": value} for name, value in cluster.s3.environment().items()]
    said = cluster.run_pod(build_pod("probe", image, env=environment)).splitlines()

    service = cluster.get("service", "echo", f"--namespace={namespace}")
    # 403: the probe brings no signature; that the server says so is the proof that it was reached.
    assert said == ["port answered", f"service {service['spec']['clusterIP']}", "s3 403"]


@pytest.mark.usefixtures("namespace")
def test_gpus_are_allocatable(cluster: Cluster, image: str) -> None:
    cluster.advertise_gpus(2)
    resources = {"limits": {"nvidia.com/gpu": "2"}}
    pod = build_pod("gpu", image, command=["python3", "-c", "print('scheduled')"], resources=resources)
    assert cluster.run_pod(pod) == "scheduled\n"
