"""The operator as a process with exactly its permissions, and a kubelet that tests play."""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import yaml

from qlora_api import names
from qlora_operator.cluster.rbac import build_cluster_rules, build_own_namespace_rules, build_rules
from tests.cluster.cluster import Cluster
from tests.cluster.host.addresses import free_ports
from tests.cluster.host.commands import wait_until
from tests.make import PREPARED_MESSAGE, PUBLISHED_MESSAGE, make_manifest

ROOT: Final = Path(__file__).parents[2]
ACCOUNT: Final = "qlora-operator"
OPERATOR_NAMESPACE: Final = "qlora-system"
NAME: Final = "support-bot"
API_PATHS: Final = {
    "qlorajobs": f"/apis/{names.GROUP}/{names.VERSION}",
    "jobs": "/apis/batch/v1",
    "events": "/apis/events.k8s.io/v1",
    **dict.fromkeys(("configmaps", "pods", "resourcequotas", "serviceaccounts", "services"), "/api/v1"),
}
"""Where the API server has a kind."""
LOG_ERRORS: Final = re.compile(r"Traceback|serviceaccount:\S+ cannot")
"""What an operator's log must not have: an error that nobody foresaw, or a right that it lacks."""
PREPARE: Final = names.prepare_job_name(NAME)
TRAIN: Final = names.train_job_name(NAME, 1)
START_PATIENCE: Final = 180.0
"""Seconds that an operator may take to start; on a machine with a load of six per core it has taken 103."""
STEP_PATIENCE: Final = 90.0
"""Seconds that one step may take, of the operator or of Kubernetes' controllers."""


def install(cluster: Cluster) -> None:
    """Install the CRDs, and an account with the operator's permissions and nothing else."""
    cluster.kubectl("apply", "-f", ROOT / "crds/qlorajobs.qlora.dev.yaml")
    cluster.kubectl("apply", "-f", ROOT / "crds/qloraclasses.qlora.dev.yaml")
    cluster.wait_until_served()
    cluster.apply(
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": OPERATOR_NAMESPACE}},
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": ACCOUNT, "namespace": OPERATOR_NAMESPACE}},
        *build_rbac("ClusterRole", build_rules() + build_cluster_rules(), {"name": ACCOUNT}),
        *build_rbac("Role", build_own_namespace_rules(), {"name": ACCOUNT, "namespace": OPERATOR_NAMESPACE}),
    )


def build_rbac(kind: str, rules: list[dict[str, Any]], metadata: dict[str, str]) -> tuple[dict[str, Any], ...]:
    """Some rules, and their binding to the operator's account."""
    group = "rbac.authorization.k8s.io"
    subject = {"kind": "ServiceAccount", "name": ACCOUNT, "namespace": OPERATOR_NAMESPACE}
    role = {"apiVersion": f"{group}/v1", "kind": kind, "metadata": metadata, "rules": rules}
    binding = {
        "apiVersion": f"{group}/v1", "kind": f"{kind}Binding", "metadata": metadata,
        "roleRef": {"apiGroup": group, "kind": kind, "name": ACCOUNT}, "subjects": [subject],
    }  # fmt: skip
    return role, binding


def write_kubeconfig(cluster: Cluster, path: Path, server: str = "") -> Path:
    """Write a kubeconfig with the token of the operator's account, for the API server or for a proxy before it."""
    config = yaml.safe_load(cluster.kubeconfig.read_text())
    token = cluster.kubectl("create", "token", ACCOUNT, f"--namespace={OPERATOR_NAMESPACE}").strip()
    config["users"] = [{"name": ACCOUNT, "user": {"token": token}}]
    config["contexts"][0]["context"]["user"] = ACCOUNT
    if server:
        config["clusters"][0]["cluster"] = {"server": server}
    path.write_text(yaml.safe_dump(config))
    return path


class Operator:
    """One operator process."""

    def __init__(
        self, cluster: Cluster, folder: Path, namespaces: str = "", server: str = "", **environment: str
    ) -> None:
        self.progress_port, self.health_port = free_ports(2)
        self.log = folder / "operator.log"
        self.cluster = cluster
        self.server = server
        self.kubeconfig = write_kubeconfig(cluster, folder / "kubeconfig", server)
        self._environment = {
            "KUBECONFIG": str(self.kubeconfig),
            "PATH": os.environ["PATH"],
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),  # the checkout that is tested, and not an installed one
            "QLORA_TRAINER_IMAGE": "trainer:test",
            "QLORA_PROGRESS_URL": f"http://127.0.0.1:{self.progress_port}",
            "QLORA_PROGRESS_PORT": str(self.progress_port),
            "QLORA_HEALTH_PORT": str(self.health_port),
            "QLORA_NAMESPACES": namespaces,
            **environment,
        }
        self.command: tuple[str, ...] = ("qlora_operator",)
        """Module and arguments."""
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> "Operator":
        """Start, and return when it is healthy; one that does not get there must not act on the runs of later tests."""
        self.spawn()
        try:
            wait_until(f"healthy operator, see {self.log}", self.healthy, timeout=START_PATIENCE, interval=0.05)
        except BaseException:
            self.stop()
            raise
        return self

    def spawn(self) -> None:
        """Start, and wait for nothing."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *self.command], env=self._environment, cwd=ROOT, stderr=log, stdout=log
            )

    def healthy(self) -> bool:
        """Whether /healthz answers 200; a dead process is reported at once."""
        assert self.process
        assert self.process.poll() is None, self.log.read_text()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.health_port}/healthz", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    @property
    def pid(self) -> int:
        """The process that was started last."""
        assert self.process
        return self.process.pid

    def kill(self) -> None:
        """End it without warning."""
        assert self.process
        self.process.kill()
        self.process.wait()

    def terminate(self) -> int:
        """Ask it to end, and return its exit code."""
        assert self.process
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=20)

    def stop(self) -> None:
        """Make sure that it is gone."""
        if self.process and self.process.poll() is None:
            self.kill()

    def stop_and_check_log(self, allowed: Callable[[str], bool] = lambda _: False) -> None:
        """Make sure that it is gone, and that its log has nothing amiss but for lines that are allowed."""
        self.stop()
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        amiss = [line for line in lines if LOG_ERRORS.search(line) and not allowed(line)]
        assert not amiss, "\n".join(amiss).replace("\\n", "\n")

    def post(self, namespace: str, job: str, token: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Report progress as a pod would."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.progress_port}{names.progress_path(namespace, job)}",
            json.dumps(body).encode(),
            {"Authorization": f"Bearer {token}"} if token else {},
        )
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as refusal:
            with refusal:
                return refusal.code, json.load(refusal)

    def metrics(self) -> str:
        """Return what Prometheus is answered."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.health_port}/metrics", timeout=10) as answer:
            return str(answer.read().decode())


@dataclass
class JobNamespace:
    """A namespace, its QLoRAJob, and the kubelet of its pods."""

    cluster: Cluster
    namespace: str
    patience: float = STEP_PATIENCE
    """Seconds that one step may take."""

    def kubectl(self, *args: str, stdin: str | None = None) -> str:
        """Run kubectl in this namespace."""
        return self.cluster.kubectl(f"--namespace={self.namespace}", *args, stdin=stdin)

    def submit(self, name: str = NAME, **change: Any) -> None:
        """Create a QLoRAJob."""
        self.cluster.admin.create(self.path("qlorajobs"), make_manifest(name, self.namespace, **change))

    def status(self, name: str = NAME) -> dict[str, Any]:
        """Return its status."""
        return dict(self.cluster.admin.get(f"{self.path('qlorajobs')}/{name}").get("status", {}))

    def wait_for(self, phase: str, reason: str = "", name: str = NAME) -> dict[str, Any]:
        """Wait for a phase, and for a reason if one is given; return the status."""

        def reached() -> bool:
            status = self.status(name)
            return status.get("phase") == phase and reason in {"", status.get("reason")}

        wait_until(f"{name} {phase} {reason}", reached, timeout=self.patience)
        return self.status(name)

    def items(self, kind: str) -> list[dict[str, Any]]:
        """Return every object of a kind."""
        return self.cluster.admin.items(self.path(kind))

    def path(self, kind: str) -> str:
        """Return where the API server has a kind in this namespace."""
        return f"{API_PATHS[kind]}/namespaces/{self.namespace}/{kind}"

    def jobs(self) -> dict[str, str]:
        """Return the uid of every Job by its name."""
        return {job["metadata"]["name"]: job["metadata"]["uid"] for job in self.items("jobs")}

    def pod_of(self, job: str, index: int = 0) -> str:
        """Wait for a pod of the Job that has this name now, and return the pod's name."""
        found: list[str] = []

        def appeared() -> bool:
            found[:] = [pod for pod in self.pods_of(job) if pod.startswith(f"{job}-{index}-")]
            return bool(found)

        wait_until(f"pod of {job}", appeared, timeout=self.patience)
        return found[0]

    def pods_of(self, job: str) -> list[str]:
        """Return the pods of the Job that has this name now; those of an earlier one may still be terminating."""
        uid = self.jobs().get(job)
        selector = f"batch.kubernetes.io/controller-uid={uid}"
        pods = self.cluster.admin.items(self.path("pods"), selector) if uid else []
        return [pod["metadata"]["name"] for pod in pods if "deletionTimestamp" not in pod["metadata"]]

    def pod_name(self, job: str) -> str:
        """Return the name of a Job's pod, whether it ends or not."""
        pods = self.cluster.admin.items(self.path("pods"), f"batch.kubernetes.io/job-name={job}")
        return str(pods[0]["metadata"]["name"])

    def metadata(self, kind: str, name: str) -> dict[str, Any]:
        """Return an object's metadata."""
        return dict(self.cluster.admin.get(f"{self.path(kind)}/{name}")["metadata"])

    def bind_pod(self, job: str, index: int = 0) -> None:
        """Play the scheduler: give the pod a node, which nobody has to own."""
        pod = self.pod_of(job, index)
        target = {"apiVersion": "v1", "kind": "Node", "name": "nowhere"}
        binding = {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": pod}, "target": target}
        self.cluster.admin.create(f"{self.path('pods')}/{pod}/binding", binding)

    def set_pod(self, job: str, phase: str, state: dict[str, Any], index: int = 0) -> None:
        """Play the kubelet: write what a container does."""
        container = {
            "name": names.CONTAINER, "state": state, "image": "trainer:test", "imageID": "", "ready": False,
            "restartCount": 0,
        }  # fmt: skip
        path = f"{self.path('pods')}/{self.pod_of(job, index)}"
        code, answer = self.cluster.admin.patch_status(path, {"phase": phase, "containerStatuses": [container]})
        assert code == 200, answer

    def start_pod(self, job: str, index: int = 0) -> None:
        """The container runs."""
        self.set_pod(job, "Running", {"running": {"startedAt": wire_now()}}, index)

    def end_pod(self, job: str, code: int, message: str, index: int = 0) -> None:
        """The container has ended."""
        ended = {
            "exitCode": code, "message": message, "reason": "Error" if code else "Completed",
            "startedAt": wire_now(), "finishedAt": wire_now(),
        }  # fmt: skip
        self.set_pod(job, "Failed" if code else "Succeeded", {"terminated": ended}, index)

    def run_to_training(self) -> None:
        """Submit, prepare, and start the training pod."""
        self.submit()
        self.end_pod(PREPARE, 0, PREPARED_MESSAGE)
        self.start_pod(TRAIN)
        self.wait_for("Training")

    def run_to_success(self) -> None:
        """The whole life."""
        self.run_to_training()
        self.end_pod(TRAIN, 0, PUBLISHED_MESSAGE)
        self.wait_for("Succeeded")

    def token(self, pod: str, audience: str = names.TOKEN_AUDIENCE) -> str:
        """Return a token that is bound to a pod."""
        uid = self.kubectl("get", "pod", pod, "--output=jsonpath={.metadata.uid}")
        return self.kubectl(
            "create", "token", "default", f"--audience={audience}", "--bound-object-kind=Pod",
            f"--bound-object-name={pod}", f"--bound-object-uid={uid}",
        ).strip()  # fmt: skip


@contextmanager
def open_job_namespace(cluster: Cluster, title: str, patience: float = STEP_PATIENCE) -> Iterator[JobNamespace]:
    """A namespace of its own, named after a test."""
    namespace = re.sub(r"[^a-z0-9]+", "-", title.lower())[:50].strip("-")
    cluster.create_namespace(namespace)
    job_namespace = JobNamespace(cluster, namespace, patience)
    wait_until("account", lambda: bool(job_namespace.items("serviceaccounts")))
    yield job_namespace
    cluster.admin.delete(f"/api/v1/namespaces/{namespace}")


def wire_now() -> str:
    """The time as Kubernetes writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
