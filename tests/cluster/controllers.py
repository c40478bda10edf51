"""Other projects' controllers as processes of this machine: JobSet to compare with, Kueue to work with."""

import shutil
from pathlib import Path
from typing import Any, Final

import yaml

from tests.cluster.addresses import free_ports
from tests.cluster.binaries import binary, source
from tests.cluster.cluster import Cluster
from tests.cluster.control_plane import ControlPlane
from tests.cluster.paths import ensure_folder
from tests.cluster.pki import encode
from tests.cluster.processes import Processes
from tests.cluster.progress import Unavailable

FAST: Final = {"qps": 500, "burst": 500}
"""Calls per second that a controller may make: JobSet's own default; Kueue's is a tenth."""
WEBHOOKS_OF_KUEUE: Final = ("batch-v1-job", "kueue-x-k8s-io")
"""Parts of the paths that are served; the rest is for kinds that this cluster does not have."""


def start_jobset(cluster: Cluster) -> None:
    """Start JobSet without its webhooks: manifests that spell out what these would fill in need none."""
    start_controller(cluster, "jobset", {"apiVersion": "config.jobset.x-k8s.io/v1alpha1"})


def start_kueue(cluster: Cluster) -> None:
    """Start Kueue for Jobs that name a queue, with the webhooks that hold such Jobs back."""
    port = start_controller(
        cluster,
        "kueue",
        {
            "apiVersion": "config.kueue.x-k8s.io/v1beta1",
            "integrations": {"frameworks": ["batch/job"]},
            # It needs certificates at a fixed place, and nobody asks for it here.
            "featureGates": {"VisibilityOnDemand": False},
        },
    )
    cluster.apply(*build_webhooks(plane_of(cluster), port))


def start_controller(cluster: Cluster, name: str, config: dict[str, Any]) -> int:
    """Install a controller's CRDs and account, start it, and return the port of its webhooks."""
    plane = plane_of(cluster)
    cluster.kubectl("apply", "--server-side", f"--filename={source(name) / 'config/components/crd/bases'}")
    cluster.wait_until_served()
    port, health = free_ports(2)
    whole = {
        "kind": "Configuration",
        "leaderElection": {"leaderElect": False},
        "internalCertManagement": {"enable": False},
        "clientConnection": FAST,
        "webhook": {"port": port, "certDir": str(write_certificate(plane, name))},
        "metrics": {"bindAddress": "0"},
        "health": {"healthProbeBindAddress": f"127.0.0.1:{health}"},
        **config,
    }
    file = plane.folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(whole))
    kubeconfig = {"KUBECONFIG": str(write_account(cluster, name))}
    processes = processes_of(cluster)
    processes.start(name, [binary(name), f"--config={file}"], kubeconfig)
    processes.wait_for_port(name, "127.0.0.1", port)
    return port


def write_certificate(plane: ControlPlane, name: str) -> Path:
    """Sign the webhook server's certificate, and return its folder."""
    folder = ensure_folder(plane.folder / f"{name}-certificate")
    pair = plane.authority.server(name, ["localhost"], ["127.0.0.1"])
    shutil.copy(pair.certificate, folder / "tls.crt")
    shutil.copy(pair.key, folder / "tls.key")
    return folder


def write_account(cluster: Cluster, name: str) -> Path:
    """Make the controller an account that may do everything, and return a kubeconfig with its token."""
    namespace = f"{name}-system"
    subject = {"kind": "ServiceAccount", "name": name, "namespace": namespace}
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"}
    cluster.apply(
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}},
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name, "namespace": namespace}},
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": name},
            "roleRef": role,
            "subjects": [subject],
        },
    )
    config = yaml.safe_load(cluster.kubeconfig.read_text())
    config["users"][0]["user"] = {"token": cluster.kubectl("create", "token", name, f"--namespace={namespace}").strip()}
    path = plane_of(cluster).folder / f"{name}.kubeconfig"
    path.write_text(yaml.safe_dump(config))
    return path


def build_webhooks(plane: ControlPlane, port: int) -> list[dict[str, Any]]:
    """Return Kueue's webhook configurations for a server on this machine."""
    manifests = source("kueue") / "config/components/webhook/manifests.yaml"
    return [build_webhook(config, plane, port) for config in yaml.safe_load_all(manifests.read_text())]


def build_webhook(config: dict[str, Any], plane: ControlPlane, port: int) -> dict[str, Any]:
    """Return one configuration without the kinds that nobody serves."""
    served = []
    for webhook in config["webhooks"]:
        path = webhook["clientConfig"]["service"]["path"]
        if any(part in path for part in WEBHOOKS_OF_KUEUE):
            client = {"url": f"https://127.0.0.1:{port}{path}", "caBundle": encode(plane.authority.ca.certificate)}
            served.append({**webhook, "clientConfig": client})
    return {**config, "metadata": {"name": f"kueue-{config['metadata']['name']}"}, "webhooks": served}


def plane_of(cluster: Cluster) -> ControlPlane:
    """Return the control plane, which has to be ours: the API server must reach webhooks on this machine."""
    if cluster.plane is None:
        raise Unavailable("controllers on this machine need a control plane that was started here")
    return cluster.plane


def processes_of(cluster: Cluster) -> Processes:
    """Return the programs of a cluster that was started here."""
    if cluster.processes is None:
        raise Unavailable("this cluster was not started here")
    return cluster.processes
