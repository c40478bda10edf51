"""etcd, API server, controller manager and scheduler as processes of this machine; no root needed."""

import ssl
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.cluster.host.addresses import free_ports, host_address
from tests.cluster.host.commands import wait_until
from tests.cluster.host.paths import ensure_folder
from tests.cluster.host.processes import Processes
from tests.cluster.programs.binaries import binary
from tests.cluster.services.pki import Authority, make_authority

SERVICE_RANGE: Final = "10.96.0.0/16"
"""Addresses of Services; the first one is the API server's own."""

SERVER_NAMES: Final = [
    "localhost",
    "kubernetes",
    "kubernetes.default",
    "kubernetes.default.svc",
    "kubernetes.default.svc.cluster.local",
]


@dataclass(frozen=True)
class ControlPlane:
    """Where the API server is, and who may sign for it."""

    folder: Path
    address: str
    port: int
    authority: Authority

    @property
    def server(self) -> str:
        """The API server's URL, the same for host and pods."""
        return f"https://{self.address}:{self.port}"

    @property
    def kubeconfig(self) -> Path:
        """The administrator's kubeconfig."""
        return self.folder / "kubeconfig"

    def component_kubeconfig(self, name: str, user: str, group: str = "") -> Path:
        """Write a kubeconfig for a component with an identity of its own."""
        client = self.authority.client(name, user, group)
        return self.authority.kubeconfig(self.folder / f"{name}.kubeconfig", self.server, client)


def start_control_plane(folder: Path, processes: Processes, api_server_flags: Sequence[str] = ()) -> ControlPlane:
    """Start the four programs and return when the API server is ready."""
    etcd_port, peer_port, api_port = free_ports(3)
    plane = ControlPlane(folder, host_address(), api_port, make_authority(folder / "pki"))
    processes.start("etcd", etcd_command(folder, etcd_port, peer_port))
    admin = plane.authority.client("admin", "admin", "system:masters")
    plane.authority.kubeconfig(plane.kubeconfig, plane.server, admin)
    sign_server(plane)
    processes.wait_for_port("etcd", "127.0.0.1", etcd_port)
    processes.start("kube-apiserver", [*api_server_command(plane, etcd_port), *api_server_flags])
    controller_manager = controller_manager_command(plane)
    scheduler = scheduler_command(plane)
    wait_until_ready(plane, processes)
    processes.start("kube-controller-manager", controller_manager)
    processes.start("kube-scheduler", scheduler)
    return plane


def sign_server(plane: ControlPlane) -> None:
    """Sign the API server's certificate for every way in which it is reached."""
    plane.authority.server("apiserver", SERVER_NAMES, ["127.0.0.1", "10.96.0.1", plane.address])


def etcd_command(folder: Path, port: int, peer_port: int) -> list[object]:
    """One member without fsync: losing the data in a power cut is fine for a test, waiting for the disk is not."""
    client, peer = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{peer_port}"
    return [
        binary("etcd"),
        f"--data-dir={ensure_folder(folder / 'etcd')}",
        f"--listen-client-urls={client}",
        f"--advertise-client-urls={client}",
        f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster=default={peer}",
        "--unsafe-no-fsync",
        "--quota-backend-bytes=8589934592",
        "--log-level=warn",
    ]


def api_server_command(plane: ControlPlane, etcd_port: int) -> list[object]:
    """Built from one certificate authority; Node and RBAC decide, as on a real cluster."""
    pki, serving, admin = plane.folder / "pki", plane.authority.pair("apiserver"), plane.authority.pair("admin")
    return [
        binary("kube-apiserver"),
        f"--etcd-servers=http://127.0.0.1:{etcd_port}",
        f"--advertise-address={plane.address}",
        f"--secure-port={plane.port}",
        f"--service-cluster-ip-range={SERVICE_RANGE}",
        f"--client-ca-file={plane.authority.ca.certificate}",
        f"--tls-cert-file={serving.certificate}",
        f"--tls-private-key-file={serving.key}",
        f"--kubelet-client-certificate={admin.certificate}",
        f"--kubelet-client-key={admin.key}",
        # The host's name resolves nowhere, so `kubectl logs` must use the node's address.
        "--kubelet-preferred-address-types=InternalIP",
        f"--service-account-key-file={pki / 'service-accounts.key'}",
        f"--service-account-signing-key-file={pki / 'service-accounts.key'}",
        "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        "--allow-privileged=true",
    ]


def controller_manager_command(plane: ControlPlane) -> list[object]:
    """Without leader election, which would cost every start 15 seconds after a crash."""
    kubeconfig = plane.component_kubeconfig("controller-manager", "system:kube-controller-manager")
    return [
        binary("kube-controller-manager"),
        f"--kubeconfig={kubeconfig}",
        f"--service-account-private-key-file={plane.folder / 'pki' / 'service-accounts.key'}",
        f"--root-ca-file={plane.authority.ca.certificate}",
        "--use-service-account-credentials",
        "--leader-elect=false",
        "--secure-port=0",
        # The defaults (20 and 30) make a test with thousands of Jobs wait for the client, not for the code under test.
        "--kube-api-qps=300",
        "--kube-api-burst=600",
    ]


def scheduler_command(plane: ControlPlane) -> list[object]:
    """The scheduler with its default profile."""
    kubeconfig = plane.component_kubeconfig("scheduler", "system:kube-scheduler")
    return [binary("kube-scheduler"), f"--kubeconfig={kubeconfig}", "--leader-elect=false", "--secure-port=0"]


def wait_until_ready(plane: ControlPlane, processes: Processes) -> None:
    """Return when the API server says that it is ready."""

    def ready() -> bool:
        processes.check("kube-apiserver")
        return answers_ok(f"{plane.server}/readyz", plane.authority)

    wait_until("API server", ready, timeout=90)


def answers_ok(url: str, authority: Authority) -> bool:
    """Say whether an HTTPS address of this cluster answers 200 to its administrator."""
    context = ssl.create_default_context(cafile=str(authority.ca.certificate))
    admin = authority.pair("admin")
    context.load_cert_chain(admin.certificate, admin.key)
    try:
        with urllib.request.urlopen(url, context=context, timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
