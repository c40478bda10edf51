"""The pod network: one bridge, cluster DNS and Services; pods have no way out of the machine."""

import json
import shutil
from pathlib import Path
from typing import Final

import yaml

from tests.cluster.host.addresses import free_ports
from tests.cluster.host.commands import run, succeeds
from tests.cluster.host.paths import ensure_folder
from tests.cluster.host.processes import Processes
from tests.cluster.programs.binaries import binary
from tests.cluster.services.control_plane import ControlPlane

BRIDGE: Final = "cni0"
BRIDGE_MAC: Final = "02:00:0a:f4:00:01"
"""Locally administered; the last four bytes are GATEWAY."""
GATEWAY: Final = "10.244.0.1"
"""The bridge's own address: what listens here on the host is reachable from every pod."""

POD_RANGE: Final = "10.244.0.0/24"
CLUSTER_DOMAIN: Final = "cluster.local"

KUBE_PROXY_TABLES: Final = (("ip", "kube-proxy"), ("ip6", "kube-proxy"))

COREFILE: Final = """\
.:53 {{
    bind {gateway}
    kubernetes {domain} in-addr.arpa {{
        kubeconfig {kubeconfig} c
        pods insecure
    }}
    cache 5
}}
"""

BRIDGED_TRAFFIC: Final = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")
"""Without it an answer from pod to pod skips address translation, and a Service on the bridge never answers."""


def start_bridge() -> None:
    """Make the bridge before the first pod would, because DNS and S3 listen on its address."""
    remove_network()
    # With an address of its own: else it takes the lowest of its pods', which changes when that one ends, and the
    # others send to the old one until they ask again.
    run(["ip", "link", "add", BRIDGE, "address", BRIDGE_MAC, "type", "bridge"])
    run(["ip", "address", "add", f"{GATEWAY}/24", "dev", BRIDGE])
    run(["ip", "link", "set", BRIDGE, "up"])
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    if not BRIDGED_TRAFFIC.exists():
        succeeds(["modprobe", "br_netfilter"])
    if BRIDGED_TRAFFIC.exists():
        BRIDGED_TRAFFIC.write_text("1")


def remove_network() -> None:
    """Remove the bridge and kube-proxy's rules, whoever left them."""
    succeeds(["ip", "link", "delete", BRIDGE])
    for family, table in KUBE_PROXY_TABLES:
        succeeds(["nft", "delete", "table", family, table])
    for pattern in ("pods-*", "cni-loopback-*"):
        for result in Path("/var/lib/cni/results").glob(pattern):
            result.unlink()


def write_pod_network(folder: Path) -> Path:
    """Write the configuration that gives each pod an address on the bridge."""
    ranges = [[{"subnet": POD_RANGE}]]
    addresses = {
        "type": "host-local",
        "ranges": ranges,
        "routes": [{"dst": "0.0.0.0/0"}],
        "dataDir": str(folder / "ipam"),
    }
    bridge = {"type": "bridge", "bridge": BRIDGE, "isGateway": True, "ipMasq": False, "hairpinMode": True}
    ports = {"type": "portmap", "capabilities": {"portMappings": True}}
    network = {"cniVersion": "0.4.0", "name": "pods", "plugins": [{**bridge, "ipam": addresses}, ports]}
    shutil.rmtree(folder, ignore_errors=True)
    (ensure_folder(folder) / "10-pods.conflist").write_text(json.dumps(network))
    return folder


def start_dns(plane: ControlPlane, processes: Processes) -> None:
    """Answer for the names of Services and pods on the bridge's address."""
    corefile = plane.folder / "Corefile"
    corefile.write_text(COREFILE.format(gateway=GATEWAY, domain=CLUSTER_DOMAIN, kubeconfig=plane.kubeconfig))
    processes.start("coredns", [binary("coredns"), "-conf", corefile])
    processes.wait_for_port("coredns", GATEWAY, 53)


def start_service_proxy(plane: ControlPlane, processes: Processes, node: str) -> None:
    """Translate the addresses of Services to those of their pods."""
    kubeconfig = plane.component_kubeconfig("kube-proxy", "system:kube-proxy")
    config = plane.folder / "kube-proxy.yaml"
    config.write_text(yaml.safe_dump(build_proxy_config(kubeconfig, node)))
    processes.start("kube-proxy", [binary("kube-proxy"), f"--config={config}"])


def build_proxy_config(kubeconfig: Path, node: str) -> dict[str, object]:
    """Configure nftables mode, and leave the kernel's connection limits alone."""
    health, metrics = free_ports(2)
    return {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "nftables",
        # Without br_netfilter an answer from pod to pod passes the bridge untranslated, unless it must go to the host.
        "nftables": {"masqueradeAll": not BRIDGED_TRAFFIC.exists()},
        "clusterCIDR": POD_RANGE,
        "clientConnection": {"kubeconfig": str(kubeconfig)},
        "hostnameOverride": node,
        "conntrack": {"maxPerCore": 0},
        "healthzBindAddress": f"127.0.0.1:{health}",
        "metricsBindAddress": f"127.0.0.1:{metrics}",
    }
