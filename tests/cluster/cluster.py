"""The test cluster as tests see it: start it, speak to it, bring images to it."""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from tests.cluster.admin import Admin
from tests.cluster.host.commands import run, succeeds, wait_until
from tests.cluster.host.paths import lock
from tests.cluster.host.processes import Processes
from tests.cluster.host.progress import Unavailable, say
from tests.cluster.node import images
from tests.cluster.node.containers import Containerd
from tests.cluster.node.network import GATEWAY, start_bridge
from tests.cluster.node.node import NODE, ensure_node_possible, start_node
from tests.cluster.programs.binaries import binary
from tests.cluster.services import kwok
from tests.cluster.services.control_plane import ControlPlane, start_control_plane
from tests.cluster.services.s3 import S3, start_s3
from tests.cluster.state import START_LOCK, State, all_states, find_state, remove_abandoned

RESTRICTED: Final = {"pod-security.kubernetes.io/enforce": "restricted"}
"""Labels of a namespace that enforces the restricted Pod Security profile."""
NODE_WAIT: Final = 600.0
"""Seconds to wait for another test run to give this machine's one node back."""


class PodFailedError(Exception):
    """A pod that should have succeeded ended otherwise; the message carries its log."""


@dataclass
class Cluster:
    """A Kubernetes to test against: started here, or one that exists already."""

    kubeconfig: Path
    state: State | None = None
    processes: Processes | None = None
    containerd: Containerd | None = None
    s3_server: S3 | None = None
    plane: ControlPlane | None = None

    @classmethod
    def start(
        cls,
        name: str | None = None,
        *,
        node: bool = False,
        kwok_nodes: int = 0,
        stages: str = "",
        s3: bool = True,
        api_server_flags: Sequence[str] = (),
    ) -> "Cluster":
        """Start a cluster that ends with this process unless it is detached; use it in a `with` statement."""
        state = find_state(name or f"session-{os.getpid()}")
        with lock(START_LOCK):
            remove_abandoned()
            if (state.folder / "kubeconfig").exists():
                raise Unavailable(
                    f"cluster {state.name} runs already: `python -m tests.cluster down --name {state.name}`"
                )
            state.claim()
        try:
            return cls.build(
                state, node=node, kwok_nodes=kwok_nodes, stages=stages, s3=s3, api_server_flags=api_server_flags
            )
        except BaseException:
            state.stop()
            raise

    @classmethod
    def build(
        cls, state: State, *, node: bool, kwok_nodes: int, stages: str, s3: bool, api_server_flags: Sequence[str]
    ) -> "Cluster":
        """Bring up the parts in the order in which they need each other."""
        if node:
            ensure_node_possible()
            claim_node(state)
        processes, started = Processes(state.folder), time.monotonic()
        say(f"starting {state.name}")
        plane = start_control_plane(state.folder, processes, api_server_flags)
        cluster = cls(plane.kubeconfig, state, processes, plane=plane)
        if s3:
            cluster.s3_server = start_s3(state.folder, processes, GATEWAY if node else "127.0.0.1")
            state.remember_s3(cluster.s3_server)
        if node:
            cluster.containerd = start_node(plane, processes)
        if kwok_nodes:
            kwok.start_simulator(plane, processes, stages)
            cluster.add_simulated_nodes(kwok_nodes)
        cluster.wait_until_usable()
        say(f"{state.name} is ready after {time.monotonic() - started:.0f} s")
        return cluster

    @classmethod
    def attach(cls, name: str) -> "Cluster":
        """Use a cluster that runs detached on this machine."""
        state = find_state(name)
        kubeconfig = state.folder / "kubeconfig"
        if not kubeconfig.exists():
            raise Unavailable(f"no cluster {name} runs here: `python -m tests.cluster up --name {name}`")
        containerd = Containerd(state.folder / "containerd") if state.has_node else None
        return cls(kubeconfig, state, Processes(state.folder), containerd, state.recall_s3())

    @classmethod
    def existing(cls, kubeconfig: Path) -> "Cluster":
        """Use an existing cluster; nothing is started, and S3 is the server that the environment names."""
        endpoint = os.environ.get("QLORA_TEST_S3_ENDPOINT")
        keys = (os.environ.get("AWS_ACCESS_KEY_ID", ""), os.environ.get("AWS_SECRET_ACCESS_KEY", ""))
        return cls(kubeconfig, s3_server=S3(endpoint, *keys) if endpoint else None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop the cluster and remove everything it wrote; an existing cluster is left as it is."""
        if self.state and not self.state.detached():
            stop_cluster(self.state, self.processes)

    def detach(self) -> None:
        """Let the cluster outlive this process."""
        if self.state:
            self.state.detach()

    @property
    def s3(self) -> S3:
        """The S3 server."""
        if not self.s3_server:
            raise Unavailable("this cluster has no S3 server: set QLORA_TEST_S3_ENDPOINT and the AWS_ keys")
        return self.s3_server

    @cached_property
    def admin(self) -> Admin:
        """The API server, for many small questions."""
        return Admin(self.kubeconfig)

    def kubectl(self, *args: str | Path, stdin: str | None = None) -> str:
        """Run kubectl as administrator and return what it prints."""
        return run([binary("kubectl"), f"--kubeconfig={self.kubeconfig}", *args], stdin=stdin)

    def get(self, *args: str) -> Any:
        """Return what `kubectl get` finds, as parsed JSON."""
        return json.loads(self.kubectl("get", *args, "--output=json"))

    def apply(self, *manifests: dict[str, Any]) -> None:
        """Apply objects, server side."""
        items = json.dumps({"apiVersion": "v1", "kind": "List", "items": manifests})
        self.kubectl("apply", "--server-side", "--force-conflicts", "--filename=-", stdin=items)

    def create_namespace(self, name: str) -> None:
        """Create a namespace as a cautious administrator would."""
        manifest = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": RESTRICTED}}
        self.admin.create("/api/v1/namespaces", manifest)

    def run_pod(self, pod: dict[str, Any], timeout: float = 120) -> str:
        """Run a pod to its end and return its log; raise with the log if it failed."""
        name, namespace = pod["metadata"]["name"], pod["metadata"].get("namespace", "default")
        self.apply(pod)
        wait_until(f"end of pod {name}", lambda: self.phase(name, namespace) in {"Succeeded", "Failed"}, timeout, 0.5)
        log = self.kubectl("logs", f"--namespace={namespace}", name)
        if self.phase(name, namespace) == "Failed":
            raise PodFailedError(f"pod {name} failed:\n{log}")
        return log

    def phase(self, name: str, namespace: str) -> str:
        """Return a pod's phase."""
        return str(self.get("pod", name, f"--namespace={namespace}")["status"].get("phase", "Pending"))

    def helm(self, *args: str | Path) -> str:
        """Run Helm as administrator and return what it prints."""
        return run([binary("helm"), f"--kubeconfig={self.kubeconfig}", *args])

    def advertise_gpus(self, count: int, product: kwok.GpuProduct = kwok.A100, node: str = NODE) -> None:
        """Let a node advertise GPUs that it does not have: pods that request them are scheduled, and find no CUDA."""
        offer = {"nvidia.com/gpu": str(count)}
        patch = json.dumps({"status": {"capacity": offer, "allocatable": offer}})
        self.kubectl("patch", "node", node, "--subresource=status", "--type=merge", f"--patch={patch}")
        labels = [f"{key}={value}" for key, value in kwok.build_gpu_labels(product, count).items()]
        self.kubectl("label", "node", node, "--overwrite", *labels)

    def add_simulated_nodes(
        self,
        count: int,
        product: kwok.GpuProduct = kwok.A100,
        gpus: int = 8,
        prefix: str = "gpu",
        simulator: str = kwok.SIMULATOR,
    ) -> None:
        """Add nodes that only KWOK plays; it must run, which `kwok_nodes` at the start takes care of."""
        nodes = kwok.build_nodes(count, product, gpus, prefix, simulator)
        self.kubectl("create", "--filename=-", stdin=nodes)

    def load_image(self, reference: str) -> str:
        """Bring an image that build_image made to the node."""
        if not (self.containerd and self.processes):
            raise Unavailable("this cluster's node is not ours: push the images to a registry that it pulls from")
        return images.load_image(self.containerd, self.processes, reference)

    def wait_until_served(self) -> None:
        """Return when every CRD is served; `kubectl wait` fails on one that has no condition yet."""
        wait_until("every CRD", lambda: all(holds(crd, "Established") for crd in self.get("crd")["items"]), 60)

    def wait_until_usable(self) -> None:
        """Return when pods can be created and every node is Ready."""
        account = [binary("kubectl"), f"--kubeconfig={self.kubeconfig}", "get", "serviceaccount", "default"]
        wait_until("the default service account", lambda: succeeds(account), timeout=60)
        # `kubectl wait --all` watches node by node, which takes minutes for a thousand of them.
        wait_until("Ready nodes", lambda: all(is_ready(node) for node in self.get("nodes")["items"]), 120, 0.5)


def is_ready(node: dict[str, Any]) -> bool:
    """Return whether a node is Ready."""
    return holds(node, "Ready")


def holds(item: dict[str, Any], kind: str) -> bool:
    """Say whether an object reports a condition; a new one reports none at all."""
    conditions = item.get("status", {}).get("conditions") or ()
    return any(condition["type"] == kind and condition["status"] == "True" for condition in conditions)


def claim_node(state: State) -> None:
    """Take this machine's one node, waiting for another test run to give it back."""
    deadline = time.monotonic() + NODE_WAIT
    while not try_to_claim_node(state):
        if time.monotonic() > deadline:
            raise Unavailable("another test run holds this machine's one node")
        time.sleep(2)


def try_to_claim_node(state: State) -> bool:
    """Take the node and its bridge if no other cluster has them; a detached one will not give them back."""
    with lock(START_LOCK):
        remove_abandoned()
        others = [other for other in all_states() if other.has_node and other.name != state.name]
        if detached := [other.name for other in others if other.detached()]:
            [name] = detached
            raise Unavailable(
                f"cluster {name} has this machine's one node: use it with QLORA_TEST_CLUSTER={name}, "
                f"or end it with `python -m tests.cluster down --name {name}`"
            )
        if others:
            return False
        state.take_node()
        start_bridge()
        return True


def stop_cluster(state: State, processes: Processes | None) -> None:
    """Stop a cluster, and collect the programs that were this process's children."""
    with lock(START_LOCK):
        state.stop()
    for child in processes.children if processes else []:
        child.wait(timeout=30)
