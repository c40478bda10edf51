"""The node that the other tests of this folder stand on runs pods as a production cluster would."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.images import build_image

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
import urllib.error
import urllib.request

print("service", socket.gethostbyname("echo.node-test.svc.cluster.local"))
print("port", urllib.request.urlopen("http://echo:8080/", timeout=20).read().decode())
try:
    print("s3", urllib.request.urlopen(os.environ["AWS_ENDPOINT_URL"], timeout=20).status)
except urllib.error.HTTPError as refusal:
    print("s3", refusal.code)
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
    """A namespace that accepts nothing but pods under the restricted profile."""
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    cluster.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE, "labels": labels}})
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
        "spec": {"restartPolicy": "Never", "automountServiceAccountToken": False, "containers": [main]},
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
    cluster.apply(build_pod("probe", image, env=environment))
    cluster.kubectl(
        "wait", "--for=jsonpath={.status.phase}=Succeeded", f"--namespace={namespace}", "pod/probe", "--timeout=60s"
    )

    service = cluster.get("service", "echo", f"--namespace={namespace}")
    said = cluster.kubectl("logs", f"--namespace={namespace}", "probe").splitlines()
    # 403: the probe brings no signature; that the server says so is the proof that it was reached.
    assert said == [f"service {service['spec']['clusterIP']}", "port answered", "s3 403"]


def test_gpus_are_offered(cluster: Cluster, namespace: str, image: str) -> None:
    cluster.advertise_gpus(2)
    resources = {"limits": {"nvidia.com/gpu": "2"}}
    cluster.apply(build_pod("gpu", image, command=["python3", "-c", "print('scheduled')"], resources=resources))
    cluster.kubectl(
        "wait", "--for=jsonpath={.status.phase}=Succeeded", f"--namespace={namespace}", "pod/gpu", "--timeout=60s"
    )
