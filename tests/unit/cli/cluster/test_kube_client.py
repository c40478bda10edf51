"""What the client makes of an API server's answers that a healthy one does not give."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora_cli.cluster import kube_client
from qlora_cli.cluster.client import AlreadyExistsError, ClusterError, NotFoundError, UnreachableError
from qlora_cli.cluster.kube_client import KubeClient, connect
from tests.make import REF, make_manifest


class Answers(ThreadingHTTPServer):
    """Gives one answer to all, or a list page by page."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.status = 200
        self.body: Any = {}
        self.asked: list[str] = []


class _Handler(BaseHTTPRequestHandler):
    server: Answers

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        body = self.server.body(self.path) if callable(self.server.body) else self.server.body
        self.send_response(self.server.status)
        self.end_headers()
        self.wfile.write(body.encode() if isinstance(body, str) else json.dumps(body).encode())

    do_POST = do_GET  # noqa: N815 (the base class's name)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base class's name)
        """Do not log requests."""


@pytest.fixture
def server() -> Iterator[Answers]:
    with Answers() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def cluster(server: Answers, tmp_path: Path) -> KubeClient:
    return connect(str(write_kubeconfig(tmp_path, f"http://127.0.0.1:{server.server_port}")), None)[0]


def write_kubeconfig(folder: Path, server: str, namespace: str = "ml") -> Path:
    config = {
        "apiVersion": "v1", "kind": "Config", "current-context": "a",
        "clusters": [{"name": "a", "cluster": {"server": server}}],
        "users": [{"name": "a", "user": {"token": "secret"}}],
        "contexts": [
            {"name": "a", "context": {"cluster": "a", "user": "a", "namespace": namespace}},
            {"name": "b", "context": {"cluster": "a", "user": "a"}},
        ],
    }  # fmt: skip
    path = folder / "kubeconfig"
    path.write_text(yaml.safe_dump(config))
    return path


def test_default_namespace_is_that_of_the_context(tmp_path: Path):
    path = str(write_kubeconfig(tmp_path, "http://127.0.0.1:9"))
    assert (connect(path, None)[1], connect(path, "b")[1]) == ("ml", "default")


@pytest.mark.parametrize(
    ("status", "body", "kind", "message"),
    [
        (404, "404 page not found\n", ClusterError, r"has no CRD qlorajobs\.qlora\.dev; install the chart"),
        (404, {"reason": "NotFound", "message": "no 'a'"}, NotFoundError, "no 'a' in namespace ml; qlora list --all"),
        (401, {"reason": "Unauthorized", "message": "Unauthorized"}, ClusterError, "rejects these credentials; log in"),
        (403, {"reason": "Forbidden", "message": "may not"}, ClusterError, "may not; ask the cluster's administrator"),
        (409, {"reason": "AlreadyExists", "message": "there"}, AlreadyExistsError, "there"),
        (422, {"reason": "Invalid", "message": "spec.lora.rank: no"}, ClusterError, "^spec.lora.rank: no$"),
        (429, {"reason": "TooManyRequests", "message": "later"}, UnreachableError, r"is busy \(429\): later"),
        (503, "upstream is away", UnreachableError, r"is busy \(503\): upstream is away"),
    ],
)
def test_api_error_message_has_a_fix(
    cluster: KubeClient, server: Answers, *, status: int, body: Any, kind: Any, message: str
):
    server.status, server.body = status, body
    with pytest.raises(kind, match=message) as error:
        cluster.get(REF)
    assert type(error.value) is kind


def test_long_list_is_read_in_pages(cluster: KubeClient, server: Answers):
    def page(path: str) -> Any:
        last = "continue=next" in path
        return {"items": [make_manifest("b" if last else "a")], "metadata": {} if last else {"continue": "next"}}

    server.body = page
    assert [item["metadata"]["name"] for item in cluster.list_jobs("", "team=x")] == ["a", "b"]
    assert server.asked[0] == "/apis/qlora.dev/v1alpha1/qlorajobs?labelSelector=team%3Dx&limit=500"


def test_log_is_read_line_by_line(cluster: KubeClient, server: Answers):
    server.body = "one\n\ntwo é\nno end"
    assert list(cluster.log("ml", "pod", {"follow": "true"})) == ["one", "", "two é", "no end"]
    assert server.asked == ["/api/v1/namespaces/ml/pods/pod/log?container=trainer&follow=true"]


def test_log_line_without_an_end_is_read_in_parts(
    cluster: KubeClient, server: Answers, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(kube_client, "MAX_LINE_BYTES", 100_000)
    server.body = "x" * 500_000 + "\nend"
    lines = list(cluster.log("ml", "pod", {}))
    assert "".join(lines) == "x" * 500_000 + "end"
    assert lines[-1] == "end"
    assert max(map(len, lines)) < 200_000


def test_create_is_strict_and_sets_field_manager(cluster: KubeClient, server: Answers):
    cluster.create(make_manifest(), dry_run=True)
    assert server.asked == [
        "/apis/qlora.dev/v1alpha1/namespaces/ml/qlorajobs?fieldManager=qlora&fieldValidation=Strict&dryRun=All"
    ]


def test_invalid_kubeconfig_is_an_error(tmp_path: Path):
    (tmp_path / "broken").write_text("a: [")
    with pytest.raises(ClusterError, match=r"cannot read .*broken: "):
        connect(str(tmp_path / "broken"), None)
