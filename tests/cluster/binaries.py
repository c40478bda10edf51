"""The cluster's programs, built once from pinned Go modules into the cache."""

import hashlib
import json
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.cluster.commands import run
from tests.cluster.paths import CACHE, MODULES, ensure_folder, lock
from tests.cluster.progress import say
from tests.cluster.toolchain import go_environment, go_program

KUBERNETES_VERSION: Final = "v1.36.3"
"""What modules/kubernetes pins; the server reports it, and without it Helm refuses the server."""

BUILD_LOCK: Final = CACHE / "build.lock"
"""The one lock under which anything is compiled."""

VERSION_PACKAGE: Final = "k8s.io/component-base/version"


@dataclass(frozen=True)
class Program:
    """One Go main package of one of the modules, and how long its first build takes on two cores."""

    module: str
    package: str
    seconds: int
    defines: tuple[str, ...] = ()
    tags: str = ""


def kubernetes(command: str, seconds: int) -> Program:
    """Describe a program of Kubernetes itself, which learns its version from the linker."""
    major, minor, _ = KUBERNETES_VERSION.removeprefix("v").split(".")
    defines = (f"gitVersion={KUBERNETES_VERSION}", f"gitMajor={major}", f"gitMinor={minor}", "gitTreeState=clean")
    return Program(
        "kubernetes",
        f"k8s.io/kubernetes/cmd/{command}",
        seconds,
        tuple(f"{VERSION_PACKAGE}.{define}" for define in defines),
    )


PROGRAMS: Final = {
    "kube-apiserver": kubernetes("kube-apiserver", 280),
    "kube-controller-manager": kubernetes("kube-controller-manager", 60),
    "kube-scheduler": kubernetes("kube-scheduler", 10),
    "kubelet": kubernetes("kubelet", 60),
    "kubectl": kubernetes("kubectl", 50),
    "kube-proxy": kubernetes("kube-proxy", 20),
    "etcd": Program("etcd", ".", 40),
    "versitygw": Program("versitygw", "github.com/versity/versitygw/cmd/versitygw", 70),
    "helm": Program("helm", "helm.sh/helm/v4/cmd/helm", 130, ("helm.sh/helm/v4/internal/version.version=v4.3.1",)),
    "coredns": Program("coredns", "github.com/coredns/coredns", 155),
    "registry": Program("registry", "github.com/distribution/distribution/v3/cmd/registry", 105),
    "toxiproxy": Program("toxiproxy", "github.com/Shopify/toxiproxy/v2/cmd/server", 8),
    "kwok": Program("kwok", "sigs.k8s.io/kwok/cmd/kwok", 120),
    "jobset": Program("jobset", "sigs.k8s.io/jobset", 95),
    "kstatus": Program("kstatus", ".", 40),
    "kueue": Program("kueue", "sigs.k8s.io/kueue/cmd/kueue", 265),
    # Without service discovery, which would bring the libraries of every cloud.
    "promtool": Program("promtool", "github.com/prometheus/prometheus/cmd/promtool", 130, tags="remove_all_sd"),
    "actionlint": Program("actionlint", "github.com/rhysd/actionlint/cmd/actionlint", 30),
}
"""Another program is one line here and one folder under modules/ (`go get -tool PACKAGE@VERSION`)."""

CLIENT_PROGRAMS: Final = ("kubectl", "helm")
"""What tests need even on a cluster that somebody else started."""

CONTROL_PLANE_PROGRAMS: Final = (
    *CLIENT_PROGRAMS,
    "etcd",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "versitygw",
    "toxiproxy",
    "promtool",
)

CONTROLLERS: Final = ("kwok", "kueue")
"""What tests of scheduling and queues add: simulated nodes, and Kueue. JobSet is for a benchmark only."""

NODE_PROGRAMS: Final = ("kubelet", "kube-proxy", "coredns", "registry")
"""What a real node adds to the control plane's."""


def binary(name: str) -> Path:
    """Return the program, built first if the cache does not have it."""
    path = binary_path(name)
    if not path.exists():
        build(name, path)
    return path


def binary_path(name: str) -> Path:
    """Return the path of a program; it changes with everything that its module pins."""
    module = MODULES / PROGRAMS[name].module
    sources = sorted(path for path in module.iterdir() if path.suffix in {".mod", ".sum", ".go"})
    key = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
    return CACHE / "bin" / f"{module.name}-{key}" / name


def build(name: str, path: Path) -> None:
    """Build one program; a second process that wants one waits, since two builds starve each other."""
    with lock(BUILD_LOCK):
        if path.exists():
            return
        program = PROGRAMS[name]
        say(f"building {name} (about {program.seconds} s the first time)")
        started = time.monotonic()
        compile_program(program, path)
        say(f"built {name} in {time.monotonic() - started:.0f} s")


def compile_program(program: Program, path: Path) -> None:
    """Write the program to its place, all of it or nothing."""
    partial = ensure_folder(path.parent) / f"{path.name}.partial"
    flags = " ".join(["-s -w", *(f"-X {define}" for define in program.defines)])
    options = ["-trimpath", f"-tags={program.tags}", "-ldflags", flags]
    argv = [go_program(), "build", *options, "-o", partial, program.package]
    run(argv, env=go_environment(), cwd=MODULES / program.module)
    partial.rename(path)


def source(name: str) -> Path:
    """Return the folder of the module that a program comes from, fetched if the cache does not have it."""
    module = PROGRAMS[name].module
    return fetch_source(module, f"sigs.k8s.io/{module}")


def fetch_source(module: str, path: str) -> Path:
    """Return the folder of a Go module at the version that one of ours pins, fetched if the cache does not have it."""
    download = [go_program(), "mod", "download", "-json", path]
    return Path(json.loads(run(download, env=go_environment(), cwd=MODULES / module))["Dir"])


def build_programs(names: Iterable[str]) -> None:
    """Build those that are missing, then drop the compiler's cache: 10 GB that the next start does not need."""
    for name in names:
        binary(name)
    with lock(BUILD_LOCK):
        shutil.rmtree(CACHE / "go-build", ignore_errors=True)
