"""Nodes that exist only in the API server, for tests of scale and of scheduling to GPUs."""

import json
from dataclasses import dataclass
from typing import Final

from tests.cluster.host.addresses import free_ports
from tests.cluster.host.processes import Processes
from tests.cluster.programs.binaries import binary, source
from tests.cluster.services.control_plane import ControlPlane

SIMULATED: Final = "kwok.x-k8s.io/node"
"""The annotation by which a simulator knows its own nodes; the value is the simulator's name."""
SIMULATOR: Final = "kwok"
"""The one of every cluster with simulated nodes."""

DELETION: Final = """\
apiVersion: kwok.x-k8s.io/v1alpha1
kind: Stage
metadata:
  name: pod-delete
spec:
  resourceRef: {apiGroup: v1, kind: Pod}
  selector:
    matchExpressions: [{key: .metadata.deletionTimestamp, operator: Exists}]
  next: {finalizers: {empty: true}, delete: true}
"""
"""A pod is gone as soon as somebody deletes it, whatever the controller of its Job waits for; KWOK's own would wait."""


@dataclass(frozen=True)
class GpuProduct:
    """What GPU feature discovery would say about a node's GPUs."""

    name: str
    memory_mib: int
    compute: tuple[int, int]
    family: str
    resource: str = "nvidia.com/gpu"
    """What the device plugin advertises; with the MIG strategy `mixed` one resource for each profile."""


A100: Final = GpuProduct("NVIDIA-A100-SXM4-80GB", 81920, (8, 0), "ampere")
MIG: Final = GpuProduct("NVIDIA-A100-SXM4-40GB-MIG-3g.20gb", 19968, (8, 0), "ampere", "nvidia.com/mig-3g.20gb")
H100: Final = GpuProduct("NVIDIA-H100-80GB-HBM3", 81559, (9, 0), "hopper")
T4: Final = GpuProduct("Tesla-T4", 15360, (7, 5), "turing")


def build_gpu_labels(product: GpuProduct, count: int) -> dict[str, str]:
    """Return the labels that GPU feature discovery sets."""
    return {
        "nvidia.com/gpu.present": "true",
        f"{product.resource}.product": product.name,
        f"{product.resource}.memory": str(product.memory_mib),
        f"{product.resource}.count": str(count),
        "nvidia.com/gpu.family": product.family,
        "nvidia.com/gpu.compute.major": str(product.compute[0]),
        "nvidia.com/gpu.compute.minor": str(product.compute[1]),
    }


def build_node(name: str, product: GpuProduct, gpus: int, simulator: str = SIMULATOR) -> dict[str, object]:
    """One simulated node with GPUs."""
    offer = {"cpu": "64", "memory": "512Gi", "ephemeral-storage": "1Ti", "pods": "256", product.resource: str(gpus)}
    labels = {
        "kubernetes.io/hostname": name,
        "kubernetes.io/os": "linux",
        "kubernetes.io/arch": "amd64",
        "type": "kwok",
        **build_gpu_labels(product, gpus),
    }
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "annotations": {SIMULATED: simulator}, "labels": labels},
        "status": {"capacity": offer, "allocatable": offer},
    }


def build_nodes(count: int, product: GpuProduct, gpus: int, prefix: str, simulator: str = SIMULATOR) -> str:
    """Return the manifests of several nodes as one list."""
    items = [build_node(f"{prefix}-{index}", product, gpus, simulator) for index in range(count)]
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": items})


def pods_that_run() -> str:
    """Return the stages of pods that run until a test or a further stage ends them."""
    return "\n---\n".join((read_stages("pod/fast/pod-ready"), DELETION))


def pods_that_end() -> str:
    """Return the stages of pods that run at once, and of which those of Jobs succeed at once."""
    return "\n---\n".join((read_stages("pod/fast/pod-ready", "pod/fast/pod-complete"), DELETION))


def nodes_that_live() -> str:
    """Return the stages of nodes that are Ready and stay so."""
    return read_stages("node/fast/node-initialize", "node/heartbeat/node-heartbeat")


def read_stages(*names: str) -> str:
    """Return some of the stages that KWOK's own sources have."""
    folder = source("kwok") / "kustomize/stage"
    return "\n---\n".join((folder / f"{name}.yaml").read_text() for name in names)


def start_simulator(plane: ControlPlane, processes: Processes, stages: str = "", name: str = SIMULATOR) -> None:
    """Start KWOK for its own nodes; their pods run at once, and those of Jobs succeed, unless stages say otherwise."""
    [port] = free_ports(1)
    config = plane.folder / "stages.yaml"
    config.write_text("\n---\n".join((nodes_that_live(), stages or pods_that_end())))
    argv = [
        binary("kwok"),
        f"--kubeconfig={plane.kubeconfig}",
        f"--manage-nodes-with-annotation-selector={SIMULATED}={name}",
        f"--server-address=127.0.0.1:{port}",
        "--node-lease-duration-seconds=40",
        f"--config={config}",
    ]
    processes.start(name, argv)
    processes.wait_for_port(name, "127.0.0.1", port)
