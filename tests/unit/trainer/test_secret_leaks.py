"""Canary credentials in a complete run: they reach their servers, and no file, log or object."""

import json
import logging
import os
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto import mock_aws

from qlora_api.logs import formatters
from qlora_api.names import PROGRESS_TOKEN_ENV, PROGRESS_URL_ENV, SecretRole, output_root
from qlora_api.report import TerminationMessage
from qlora_api.runconfig import Platform
from qlora_api.v1alpha1 import QLoRAJobSpec
from qlora_operator.models import AttemptInputs
from qlora_operator.resources import build_prepare_config, build_prepare_job, build_train_job
from qlora_planner import make_plan
from qlora_trainer.__main__ import main
from qlora_trainer.storage import credentials
from tests.hub import FakeHub, Repository
from tests.make import INSTALLATION, OWNER, make_prepared
from tests.unit.trainer.tiny import instruction_rows, make_spec, prepare_config, run_config, serving, write_model

CANARIES = {
    "HF_TOKEN": "hf_canaryhubcanaryhubcanaryhub",
    "AWS_SECRET_ACCESS_KEY": "canary+s3/canary+s3/canary+s3/canary+s3",
    "AWS_SESSION_TOKEN": "canarysessioncanarysessioncanarysession",
    "MLFLOW_TRACKING_TOKEN": "canarymlflowcanarymlflow",
    "progress": "canary.progress.token",
}
NAMES = {SecretRole.MODEL: "hub", SecretRole.OUTPUT: "s3", SecretRole.MLFLOW: "mlflow"}


@dataclass
class Server:
    """Accepts progress, rejects MLflow metrics, and records bodies and tokens of all requests."""

    tokens: set[str] = field(default_factory=set)
    bodies: list[bytes] = field(default_factory=list)

    def handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                server.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
                self.do_GET()

            def do_GET(self) -> None:
                server.tokens.add(self.headers["Authorization"].removeprefix("Bearer "))
                answer = b"{}"
                self.send_response(403 if "/mlflow/" in self.path else 200)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *arguments: object) -> None:
                """Be quiet."""

        return Handler


@dataclass
class Pod:
    """A pod with its Secrets, a writable folder and a configuration, and everything that it leaves."""

    folder: Path
    client: Any
    server: Server
    url: str
    output: str = ""

    def run(self, command: str, config: Any) -> TerminationMessage:
        termination_message = self.folder / f"{command}.message"
        file = self.folder / f"{command}.json"
        file.write_text(config.model_dump_json(by_alias=True, exclude_none=True))
        main(
            [
                command,
                f"--config={file}",
                f"--work={self.folder / 'work'}",
                f"--termination-message={termination_message}",
            ]
        )
        return TerminationMessage.model_validate_json(termination_message.read_text())

    def left(self) -> Iterator[tuple[str, bytes]]:
        """Everything that can be read after the run, with its location."""
        yield "standard output", self.output.encode()
        for number, body in enumerate(self.server.bodies):
            yield f"report {number}", body
        for path in self.folder.rglob("*"):
            if path.is_file() and "secrets" not in path.relative_to(self.folder).parts:
                yield str(path), path.read_bytes()
        for found in self.client.list_objects_v2(Bucket="adapters")["Contents"]:
            stored = self.client.get_object(Bucket="adapters", Key=found["Key"])
            yield f"s3 {found['Key']}", stored["Body"].read() + json.dumps(stored["Metadata"]).encode()


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Restore the process-wide configuration that the trainer changes."""
    root, before, stop = logging.getLogger(), list(logging.getLogger().handlers), signal.getsignal(signal.SIGTERM)
    level, environment = root.level, dict(os.environ)
    monkeypatch.setattr(formatters, "_process", {})
    yield
    root.handlers[:] = before
    root.setLevel(level)
    logging.captureWarnings(False)
    signal.signal(signal.SIGTERM, stop)
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture
def pod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, process: None) -> Iterator[Pod]:  # noqa: ARG001 (a fixture)
    mount = tmp_path / "secrets"
    keys: Mapping[SecretRole, tuple[str, ...]] = {
        SecretRole.MODEL: ("HF_TOKEN",),
        SecretRole.OUTPUT: ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
        SecretRole.MLFLOW: ("MLFLOW_TRACKING_TOKEN",),
    }
    for role, names in keys.items():
        (mount / role).mkdir(parents=True)
        for name in names:
            (mount / role / name).write_text(CANARIES[name])
    (mount / SecretRole.OUTPUT / "AWS_ACCESS_KEY_ID").write_text("AKIAIOSFODNN7EXAMPLE")
    (mount / "token").write_text(CANARIES["progress"])
    monkeypatch.setattr(credentials, "SECRETS_MOUNT", str(mount))
    server = Server()
    with mock_aws(), serving(server.handler()) as url:
        monkeypatch.setenv(PROGRESS_URL_ENV, f"{url}/progress")
        monkeypatch.setenv(PROGRESS_TOKEN_ENV, str(mount / "token"))
        client = boto3.client("s3", region_name="us-east-1")
        client.create_bucket(Bucket="adapters")
        rows = "".join(f"{json.dumps(row)}\n" for row in instruction_rows())
        client.put_object(Bucket="adapters", Key="rows.jsonl", Body=rows.encode())
        yield Pod(tmp_path, client, server, url)


def make_canary_spec(url: str, **blocks: Any) -> QLoRAJobSpec:
    return make_spec(
        "hf://org/tiny",
        "s3://adapters/rows.jsonl",
        "s3://adapters/results",
        model={"secretRef": {"name": NAMES[SecretRole.MODEL]}},
        output={"secretRef": {"name": NAMES[SecretRole.OUTPUT]}},
        tracking={"mlflow": {"uri": url, "experiment": "bots", "secretRef": {"name": NAMES[SecretRole.MLFLOW]}}},
        **blocks,
    )


def gated(folder: Path) -> Repository:
    write_model(folder)
    return Repository({file.name: file.read_bytes() for file in folder.iterdir()}, token=CANARIES["HF_TOKEN"])


def found_in(left: Iterator[tuple[str, bytes]]) -> list[tuple[str, str]]:
    """The canaries that occur, with their locations."""
    texts = list(left)
    return [
        (name, location) for name, canary in CANARIES.items() for location, text in texts if canary.encode() in text
    ]


def test_leaked_canary_is_detected(pod: Pod) -> None:
    (pod.folder / "leak").write_text(f"token={CANARIES['HF_TOKEN']}")
    assert found_in(pod.left()) == [("HF_TOKEN", str(pod.folder / "leak"))]


def test_run_leaks_no_credential(pod: Pod, capfd: pytest.CaptureFixture[str], tmp_path_factory: Any) -> None:
    repository = gated(tmp_path_factory.mktemp("model"))
    with FakeHub({"org/tiny": repository}) as hub:
        platform = Platform(hub_endpoint=hub.endpoint)
        spec = make_canary_spec(pod.url)
        prepared = pod.run("prepare", prepare_config(spec, platform=platform)).prepared
        assert prepared is not None
        prepared = prepared.with_known_uris(output_root(spec.output.uri, "colours"), spec.model.uri)
        termination_message = pod.run("train", run_config(spec, prepared).model_copy(update={"platform": platform}))
    assert termination_message.reason == "Published", termination_message.message
    pod.output = "".join(capfd.readouterr())
    assert "MLflow failed and is disabled" in pod.output
    logs_left = dict(found for found in pod.left() if found[0].startswith("s3 results/colours/logs/"))
    assert [key.rpartition("/")[2] for key in logs_left] == ["attempt-1-node-0-rank-0.jsonl", "prepare.jsonl"]
    assert all(b'"message": "done"' in text for text in logs_left.values())
    assert b"MLflow failed and is disabled" in logs_left["s3 results/colours/logs/attempt-1-node-0-rank-0.jsonl"]
    assert {CANARIES["MLFLOW_TRACKING_TOKEN"], CANARIES["progress"]} <= pod.server.tokens, "they were used"
    assert found_in(pod.left()) == []


@pytest.mark.parametrize("broken", ["HF_TOKEN", "bucket"])
def test_failure_messages_leak_no_credential(
    pod: Pod, capfd: pytest.CaptureFixture[str], tmp_path_factory: Any, broken: str
) -> None:
    """Libraries may put credentials into their error messages."""
    repository = gated(tmp_path_factory.mktemp("model"))
    if broken == "HF_TOKEN":
        repository = Repository(repository.files, token="another")
    blocks = {"dataset": {"uri": "s3://nobody/rows.jsonl"}} if broken == "bucket" else {}
    with FakeHub({"org/tiny": repository}) as hub:
        spec = make_canary_spec(pod.url)
        spec = spec.model_copy(update={"dataset": spec.dataset.model_copy(update=blocks.get("dataset", {}))})
        termination_message = pod.run("prepare", prepare_config(spec, platform=Platform(hub_endpoint=hub.endpoint)))
    pod.output = "".join(capfd.readouterr())
    assert termination_message.message.startswith("spec.")
    assert "the run failed" in pod.output
    assert any(
        "the run failed" in text.decode(errors="replace") for location, text in pod.left() if "/logs/" in location
    )
    assert found_in(pod.left()) == []


def test_manifests_reference_secrets_by_name_and_mount_them_as_files() -> None:
    spec = make_canary_spec("http://mlflow:5000", resources={"gpusPerNode": 0})
    run = AttemptInputs(1, make_plan(spec, make_prepared()), make_prepared())
    children = (
        build_prepare_config(OWNER, spec, INSTALLATION),
        build_prepare_job(OWNER, spec, INSTALLATION),
        build_train_job(OWNER, spec, run, INSTALLATION),
    )
    for job in children[1:]:
        pod_spec = job["spec"]["template"]["spec"]
        [container] = pod_spec["containers"]
        assert "envFrom" not in container
        assert not [variable for variable in container["env"] if "valueFrom" in variable]
        mounted = {volume["secret"]["secretName"] for volume in pod_spec["volumes"] if "secret" in volume}
        assert mounted == set(NAMES.values())
        read_only = {mount["name"] for mount in container["volumeMounts"] if mount.get("readOnly")}
        assert {f"secret-{role}" for role in NAMES} <= read_only
