"""A real node on this machine: kubelet over containerd, with the pod network."""

from pathlib import Path
from typing import Final

import yaml

from tests.cluster.host.addresses import free_ports
from tests.cluster.host.commands import wait_until
from tests.cluster.host.paths import ensure_folder
from tests.cluster.host.processes import Processes
from tests.cluster.node.containers import Containerd, start_containerd
from tests.cluster.node.images import ensure_pause_image
from tests.cluster.node.network import CLUSTER_DOMAIN, GATEWAY, start_dns, start_service_proxy
from tests.cluster.programs.binaries import binary
from tests.cluster.programs.packages import ensure_commands, require_root
from tests.cluster.services.control_plane import ControlPlane, answers_ok

NODE: Final = "node1"
"""The one real node's name."""

CGROUPS: Final = Path("/sys/fs/cgroup")


def ensure_node_possible() -> None:
    """Raise Unavailable unless this machine can be a node."""
    require_root("a real node")
    ensure_commands("containerd", "runc", "buildah", "nft", "conntrack", "ip", "/usr/lib/cni/bridge", "/bin/busybox")


def start_node(plane: ControlPlane, processes: Processes) -> Containerd:
    """Start the node's programs on the bridge that exists and return when the node is Ready."""
    containerd = start_containerd(plane.folder, processes)
    ensure_pause_image(containerd)
    start_kubelet(plane, processes, containerd)
    start_dns(plane, processes)
    start_service_proxy(plane, processes, NODE)
    return containerd


def start_kubelet(plane: ControlPlane, processes: Processes, containerd: Containerd) -> None:
    """Start the kubelet with an identity of its own and return when it is healthy."""
    kubeconfig = plane.component_kubeconfig("kubelet", f"system:node:{NODE}", "system:nodes")
    config = plane.folder / "kubelet.yaml"
    port, health = free_ports(2)
    config.write_text(yaml.safe_dump(build_kubelet_config(plane, containerd, port, health)))
    argv = [
        binary("kubelet"),
        f"--config={config}",
        f"--kubeconfig={kubeconfig}",
        f"--root-dir={ensure_folder(plane.folder / 'kubelet')}",
        f"--cert-dir={plane.folder / 'kubelet-pki'}",
        f"--hostname-override={NODE}",
        f"--node-ip={plane.address}",
    ]
    processes.start("kubelet", argv)

    def healthy() -> bool:
        processes.check("kubelet")
        return answers_ok(f"http://127.0.0.1:{health}/healthz", plane.authority)

    wait_until("kubelet", healthy, timeout=60)


def build_kubelet_config(plane: ControlPlane, containerd: Containerd, port: int, health: int) -> dict[str, object]:
    """Everything in the cluster's folder, nothing evicted or collected for the sake of a developer's full disk."""
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "port": port,
        "healthzPort": health,
        "failCgroupV1": False,
        "cgroupDriver": "cgroupfs",
        "failSwapOn": False,
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(plane.authority.ca.certificate)},
        },
        "authorization": {"mode": "Webhook"},
        "containerRuntimeEndpoint": f"unix://{containerd.socket}",
        "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
        "enforceNodeAllocatable": [],
        "podLogsDir": str(ensure_folder(plane.folder / "podlogs")),
        "clusterDNS": [GATEWAY],
        "clusterDomain": CLUSTER_DOMAIN,
        "resolvConf": str(write_resolver(plane.folder)),
        "imageGCHighThresholdPercent": 100,
        # Rules of the host that nothing here needs and that would stay behind.
        "makeIPTablesUtilChains": False,
        # 5 and 10 by default, which makes a test with a dozen pods slow for no reason.
        "registryPullQPS": 0,
        "eventRecordQPS": 0,
    }


def write_resolver(folder: Path) -> Path:
    """Write the upstream resolver of pods: none but the cluster's, since nothing else can be reached."""
    path = folder / "resolv.conf"
    path.write_text(f"nameserver {GATEWAY}\n")
    return path


def remove_pod_cgroups() -> None:
    """Remove the control groups that the kubelet made; those with processes of somebody else stay."""
    for group in sorted(CGROUPS.glob("*/kubepods/**/"), key=lambda path: len(path.parts), reverse=True):
        try:
            group.rmdir()
        except OSError:
            continue
