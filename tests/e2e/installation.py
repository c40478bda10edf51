"""The installation that the end-to-end tests share: both images, the chart, the model and the data, on a real node."""

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from examples.quickstart.make_model import DEFAULT_MIRROR, make_model
from qlora_api.names import LEADER_LABEL
from tests.cluster.cluster import RESTRICTED, Cluster
from tests.cluster.host.commands import wait_until
from tests.cluster.node.images import build_image
from tests.e2e.recording import Recording

ROOT: Final = Path(__file__).parents[2]
QUICKSTART: Final = ROOT / "examples/quickstart"
TRANSCRIPT: Final = ROOT / "out/e2e"
"""What a user would have seen; the README's outputs are taken from here."""
OPERATOR_NAMESPACE: Final = "qlora-system"
RELEASE: Final = "qlora-operator"
REPLICAS: Final = 2
"""The chart's own number."""
SECRET: Final = "s3-credentials"
VALUES: Final = "values.yaml"
BUCKETS: Final = ("models", "quickstart", "adapters")


@dataclass(frozen=True)
class Installation:
    """A cluster with the operator on it, and what tests ask of it."""

    cluster: Cluster
    operator_image: str
    trainer_image: str
    recording: Recording
    """Of what a user would type: the installation, and the quickstart."""

    def make_namespace(self, name: str) -> str:
        """A namespace for QLoRAJobs: restricted pods only, and the credentials of the S3 server."""
        self.cluster.apply(namespace_manifest(name))
        keys = self.cluster.s3.environment()
        secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": SECRET, "namespace": name}}
        self.cluster.apply({**secret, "stringData": keys})
        return name

    def submit(self, manifest: dict[str, Any]) -> None:
        self.cluster.apply(manifest)

    def job(self, name: str, namespace: str) -> dict[str, Any]:
        return dict(self.cluster.get("qlorajob", name, f"--namespace={namespace}"))

    def wait_until_finished(self, name: str, namespace: str, seconds: int) -> dict[str, Any]:
        """Wait as a user would, and return the QLoRAJob."""
        self.cluster.kubectl(
            "wait", "--for=condition=Finished", f"qlj/{name}", f"--namespace={namespace}", f"--timeout={seconds}s"
        )
        return self.job(name, namespace)

    def children(self, kind: str, name: str, namespace: str) -> list[dict[str, Any]]:
        return list(self.cluster.get(kind, f"--namespace={namespace}", f"--selector=qlora.dev/job={name}")["items"])

    def operator_pods(self) -> list[dict[str, Any]]:
        selector = f"--selector=app.kubernetes.io/instance={RELEASE}"
        return list(self.cluster.get("pods", f"--namespace={OPERATOR_NAMESPACE}", selector)["items"])

    def configure(self, values: dict[str, str]) -> None:
        """Change values of the chart, and wait until an operator with these values is the leader."""
        self.cluster.helm("upgrade", RELEASE, ROOT / "charts/qlora-operator", *release_flags(values))
        wait_for("the end of the replicas before", lambda: len(self.operator_pods()) == REPLICAS, 180)
        wait_for("a leader", self.leaders, 180)

    def leaders(self) -> list[dict[str, Any]]:
        """Return the pods behind the progress Service."""
        return [pod for pod in self.operator_pods() if LEADER_LABEL in pod["metadata"]["labels"]]


def namespace_manifest(name: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": RESTRICTED}}


def release_flags(values: dict[str, str]) -> list[str]:
    settings = [f"--set-string={key}={value}" for key, value in values.items()]
    return [f"--namespace={OPERATOR_NAMESPACE}", "--reset-then-reuse-values", "--wait", "--timeout=3m", *settings]


def split_reference(reference: str) -> tuple[str, str]:
    repository, _, tag = reference.rpartition(":")
    return repository, tag


def upload_folder(cluster: Cluster, folder: Path, bucket: str, prefix: str) -> None:
    client = cluster.s3.client()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        client.upload_file(str(path), bucket, f"{prefix}/{path.relative_to(folder)}".lstrip("/"))
    client.close()


def download(installation: Installation, uri: str, folder: Path) -> Path:
    """Fetch everything below a URI, as a reader without our code would."""
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    client = installation.cluster.s3.client()
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/"):
        for item in page["Contents"]:
            target = folder / item["Key"].removeprefix(f"{prefix}/")
            target.parent.mkdir(parents=True, exist_ok=True)
            client.download_file(bucket, item["Key"], str(target))
    client.close()
    return folder


def measure(model: Path, rows: Path, *adapters: Path) -> dict[str, Any]:
    """Return the losses of adapters and of their base on these rows, computed by a script that uses only peft."""
    script = Path(__file__).with_name("plain_peft.py")
    command = [sys.executable, *map(str, (script, model, rows, *adapters))]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def manifest_of(name: str, namespace: str, **blocks: Mapping[str, Any]) -> dict[str, Any]:
    """The quickstart's manifest under another name, with some fields of some blocks changed."""
    manifest = yaml.safe_load((QUICKSTART / "job.yaml").read_text(encoding="utf-8"))
    manifest["metadata"] = {"name": name, "namespace": namespace}
    for block, fields in blocks.items():
        manifest["spec"][block] = {**manifest["spec"].get(block, {}), **fields}
    return dict(json.loads(json.dumps(manifest)))


@pytest.fixture(scope="session")
def installation(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    """Build and load the images, fill the S3 server, and install the chart as a user would."""
    operator = cluster.load_image(build_image("operator", "qlora-operator:e2e"))
    trainer = cluster.load_image(build_image("trainer", "qlora-trainer:e2e"))
    for bucket in BUCKETS:
        cluster.s3.make_bucket(bucket)
    snapshot = make_model(DEFAULT_MIRROR)
    upload_folder(cluster, snapshot.parents[1], "models", f"hub/{snapshot.parents[1].name}")
    upload_folder(cluster, QUICKSTART / "data", "quickstart", "")
    cluster.apply(namespace_manifest(OPERATOR_NAMESPACE))
    values = {
        "image.repository": split_reference(operator)[0],
        "image.tag": split_reference(operator)[1],
        "image.pullPolicy": "Never",
        "trainerImage.repository": split_reference(trainer)[0],
        "trainerImage.tag": split_reference(trainer)[1],
        "trainerImage.pullPolicy": "Never",
        "platform.s3.endpoint": cluster.s3.endpoint,
        "platform.s3.region": cluster.s3.environment()["AWS_REGION"],
        "platform.s3.addressing": "path",
        "platform.hub.mirror": "s3://models/hub",
    }
    recording = record(cluster, tmp_path_factory.mktemp("session"), values)
    recording.run("cat", VALUES)
    recording.run(
        *("helm", "upgrade", "--install", RELEASE, "charts/qlora-operator"),
        *(f"--namespace={OPERATOR_NAMESPACE}", f"--values={VALUES}", "--wait", "--timeout=3m"),
    )
    cluster.wait_until_served()
    return Installation(cluster, operator, trainer, recording)


def record(cluster: Cluster, folder: Path, values: dict[str, str]) -> Recording:
    """Open a terminal where a user's files are: the repository's, and values for the chart."""
    for name in ("charts", "examples"):
        (folder / name).symlink_to(ROOT / name)
    nested: dict[str, Any] = {}
    for key, value in values.items():
        *parents, last = key.split(".")
        block = nested
        for parent in parents:
            block = block.setdefault(parent, {})
        block[last] = value
    (folder / VALUES).write_text(yaml.safe_dump(nested, sort_keys=False), encoding="utf-8")
    environment = {**cluster.s3.environment(), "KUBECONFIG": str(cluster.kubeconfig)}
    return Recording(TRANSCRIPT / "session.cast", folder, environment)


@pytest.fixture(autouse=True)
def show_what_the_cluster_saw(request: pytest.FixtureRequest) -> Any:
    """Print the operator's log and the jobs when a test of an installation fails."""
    failed_before = request.session.testsfailed
    yield
    if request.session.testsfailed > failed_before and "installation" in request.fixturenames:
        cluster: Cluster = request.getfixturevalue("cluster")
        print(cluster.kubectl("get", "qlj,jobs,pods", "--all-namespaces", "--output=wide"))
        print(cluster.kubectl("logs", f"--namespace={OPERATOR_NAMESPACE}", f"deployment/{RELEASE}", "--tail=80"))


def wait_for(what: str, condition: Any, seconds: float) -> None:
    wait_until(what, condition, timeout=seconds, interval=0.5)
