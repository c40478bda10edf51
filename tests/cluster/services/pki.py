"""A certificate authority for one cluster, its certificates, and kubeconfigs made of them."""

import base64
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.cluster.host.commands import run
from tests.cluster.host.paths import ensure_folder
from tests.cluster.programs.packages import ensure_commands


@dataclass(frozen=True)
class KeyPair:
    """A private key and its certificate, as files."""

    key: Path
    certificate: Path


@dataclass(frozen=True)
class Authority:
    """Signs everything in one folder; the folder is removed with the cluster."""

    folder: Path

    @property
    def ca(self) -> KeyPair:
        """The authority's own pair."""
        return self.pair("ca")

    def pair(self, name: str) -> KeyPair:
        """Name the files of a pair, signed or not."""
        return KeyPair(self.folder / f"{name}.key", self.folder / f"{name}.crt")

    def client(self, name: str, user: str, group: str = "") -> KeyPair:
        """Sign a client whom the API server knows as this user, in this group."""
        subject = f"/O={group}/CN={user}" if group else f"/CN={user}"
        return self.sign(name, subject, "extendedKeyUsage=clientAuth")

    def server(self, name: str, names: list[str], addresses: list[str]) -> KeyPair:
        """Sign a server that may be reached under these names and addresses."""
        alternatives = ",".join([*(f"DNS:{each}" for each in names), *(f"IP:{each}" for each in addresses)])
        return self.sign(name, f"/CN={name}", f"extendedKeyUsage=serverAuth\nsubjectAltName={alternatives}")

    def sign(self, name: str, subject: str, extensions: str) -> KeyPair:
        """Make a key and have the authority sign it."""
        pair = self.pair(name)
        request = self.folder / f"{name}.csr"
        run([*OPENSSL_REQUEST, "-keyout", pair.key, "-out", request, "-subj", subject])
        extension_file = self.folder / f"{name}.ext"
        extension_file.write_text(extensions)
        signing = ["openssl", "x509", "-req", "-days", "30", "-in", request, "-out", pair.certificate]
        run(
            [*signing, "-CA", self.ca.certificate, "-CAkey", self.ca.key, "-CAcreateserial", "-extfile", extension_file]
        )
        return pair

    def kubeconfig(self, path: Path, server: str, client: KeyPair) -> Path:
        """Write a kubeconfig that carries its certificates inside, so that it can be copied anywhere."""
        path.write_text(yaml.safe_dump(build_kubeconfig(server, self.ca.certificate, client)))
        path.chmod(0o600)
        return path


OPENSSL_REQUEST = ["openssl", "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]


def make_authority(folder: Path) -> Authority:
    """Make a new authority, with the key that signs service account tokens."""
    ensure_commands("openssl")
    authority = Authority(ensure_folder(folder))
    folder.chmod(0o700)
    ca = authority.ca
    run([*OPENSSL_REQUEST, "-x509", "-days", "30", "-keyout", ca.key, "-out", ca.certificate, "-subj", "/CN=test-ca"])
    run(["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", folder / "service-accounts.key"])
    return authority


def build_kubeconfig(server: str, ca: Path, client: KeyPair) -> dict[str, object]:
    """One cluster, one user, one context; the context is named `c`, as the CoreDNS configuration expects."""
    user = {"client-certificate-data": encode(client.certificate), "client-key-data": encode(client.key)}
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": server, "certificate-authority-data": encode(ca)}}],
        "users": [{"name": "u", "user": user}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "c",
    }


def encode(path: Path) -> str:
    """Return a file in base64."""
    return base64.b64encode(path.read_bytes()).decode()


def decode(text: str) -> str:
    """Return what encode() made of a file."""
    return base64.b64decode(text).decode()
