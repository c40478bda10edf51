"""Other projects' controllers as processes of this machine: JobSet to compare with, Kueue to work with."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from tests.cluster.cluster import Cluster
from tests.cluster.host.addresses import free_ports
from tests.cluster.host.commands import wait_until
from tests.cluster.host.paths import CACHE, ensure_folder, lock
from tests.cluster.host.processes import Processes
from tests.cluster.host.progress import Unavailable
from tests.cluster.programs.binaries import binary, source
from tests.cluster.services.control_plane import ControlPlane
from tests.cluster.services.pki import encode

FAST: Final = {"qps": 500, "burst": 500}
"""Calls per second that a controller may make: JobSet's own default; Kueue's is a tenth."""
KUEUE_METRICS: Final = Path("/etc/kueue/metrics/certs")
CERTIFICATES: Final = 2
LOG_CHARACTERS: Final = 1_000_000
METRICS_LOCK: Final = CACHE / "kueue.lock"
WEBHOOKS_OF_KUEUE: Final = ("batch-v1-job", "kueue-x-k8s-io")
"""Parts of the paths that are served; the rest is for kinds that this cluster does not have."""


@dataclass(frozen=True)
class Controller:
    """A controller that is installed and may be started."""

    cluster: Cluster
    name: str
    port: int
    """Of its webhooks."""

    def start(self) -> None:
        """Start it, and return when it serves."""
        folder, processes = plane_of(self.cluster).folder, processes_of(self.cluster)
        kubeconfig = {"KUBECONFIG": str(folder / f"{self.name}.kubeconfig")}
        processes.start(self.name, [binary(self.name), f"--config={folder / f'{self.name}.yaml'}"], kubeconfig)
        processes.wait_for_port(self.name, "127.0.0.1", self.port)

    @property
    def pid(self) -> int:
        """The process that was started last."""
        return processes_of(self.cluster).identify(self.name).pid


def install_jobset(cluster: Cluster) -> Controller:
    """Install JobSet without its webhooks: manifests that spell out what these would fill in need none."""
    return install(cluster, "jobset", {"apiVersion": "config.jobset.x-k8s.io/v1alpha1"})


def start_kueue(cluster: Cluster, **options: Any) -> None:
    """Start Kueue for Jobs that name a queue, with the webhooks that hold such Jobs back; options are its own."""
    config = {
        "apiVersion": "config.kueue.x-k8s.io/v1beta2",
        "integrations": {"frameworks": ["batch/job"]},
        # It needs certificates at a fixed place, and nobody asks for it here.
        "featureGates": {"VisibilityOnDemand": False},
        **options,
    }
    controller = install(cluster, "kueue", config)
    with metrics_certificate(plane_of(cluster)):
        controller.start()
        wait_until("Kueue watches its certificates", lambda: watches_certificates(cluster), timeout=60)
    cluster.apply(*build_webhooks(plane_of(cluster), controller.port))


def watches_certificates(cluster: Cluster) -> bool:
    """Return whether Kueue has opened both certificates: that of its webhooks, and that of its metrics."""
    log = processes_of(cluster).tail("kueue", LOG_CHARACTERS)
    return log.count("Starting certificate poll+watcher") == CERTIFICATES


@contextmanager
def metrics_certificate(plane: ControlPlane) -> Iterator[None]:
    """Put a certificate where Kueue reads it at its start, and remove it afterwards: the path is not configurable."""
    with lock(METRICS_LOCK):
        if KUEUE_METRICS.exists():
            yield
            return
        try:
            shutil.copytree(plane.folder / "kueue-certificate", KUEUE_METRICS)
        except PermissionError as error:
            raise Unavailable(f"Kueue reads a certificate from {KUEUE_METRICS}, where only root may write") from error
        try:
            yield
        finally:
            shutil.rmtree(KUEUE_METRICS.parents[1])


def install(cluster: Cluster, name: str, config: dict[str, Any]) -> Controller:
    """Install a controller's CRDs, account, certificate and configuration."""
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
    (plane.folder / f"{name}.yaml").write_text(yaml.safe_dump(whole))
    write_account(cluster, name)
    return Controller(cluster, name, port)


def write_certificate(plane: ControlPlane, name: str) -> Path:
    """Sign the webhook server's certificate, and return its folder."""
    folder = ensure_folder(plane.folder / f"{name}-certificate")
    pair = plane.authority.server(name, ["localhost"], ["127.0.0.1"])
    shutil.copy(pair.certificate, folder / "tls.crt")
    shutil.copy(pair.key, folder / "tls.key")
    return folder


def write_account(cluster: Cluster, name: str) -> None:
    """Make the controller an account that may do everything, and write a kubeconfig with its token."""
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
    (plane_of(cluster).folder / f"{name}.kubeconfig").write_text(yaml.safe_dump(config))


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
