"""The cluster's programs, built once from pinned Go modules into the cache."""

import hashlib
import json
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.cluster.host.commands import run
from tests.cluster.host.paths import CACHE, MODULES, ensure_folder, lock
from tests.cluster.host.progress import say
from tests.cluster.programs.toolchain import go_environment, go_program

KUBERNETES_VERSION: Final = "v1.36.3"
"""What modules/programs pins; the server reports it, and without it Helm refuses the server."""

BUILD_LOCK: Final = CACHE / "build.lock"
"""The one lock under which anything is compiled."""

BUILD_TIMEOUT: Final = 3 * 3600
"""Seconds for one program: on a machine that does much else, the first one has taken an hour."""

VERSION_PACKAGE: Final = "k8s.io/component-base/version"


@dataclass(frozen=True)
class Program:
    """One Go main package of one of the modules."""

    module: str
    package: str
    defines: tuple[str, ...] = ()
    tags: str = ""


def kubernetes(command: str) -> Program:
    """Describe a program of Kubernetes itself, which learns its version from the linker."""
    major, minor, _ = KUBERNETES_VERSION.removeprefix("v").split(".")
    defines = (f"gitVersion={KUBERNETES_VERSION}", f"gitMajor={major}", f"gitMinor={minor}", "gitTreeState=clean")
    return Program(
        "programs", f"k8s.io/kubernetes/cmd/{command}", tuple(f"{VERSION_PACKAGE}.{define}" for define in defines)
    )


PROGRAMS: Final = {
    "kube-apiserver": kubernetes("kube-apiserver"),
    "kube-controller-manager": kubernetes("kube-controller-manager"),
    "kube-scheduler": kubernetes("kube-scheduler"),
    "kubelet": kubernetes("kubelet"),
    "kubectl": kubernetes("kubectl"),
    "kube-proxy": kubernetes("kube-proxy"),
    "etcd": Program("programs", "./etcd"),
    "versitygw": Program("programs", "github.com/versity/versitygw/cmd/versitygw"),
    "helm": Program("programs", "helm.sh/helm/v4/cmd/helm", ("helm.sh/helm/v4/internal/version.version=v4.3.1",)),
    "coredns": Program("programs", "./coredns"),
    "registry": Program("programs", "./registry"),
    "toxiproxy": Program("programs", "github.com/Shopify/toxiproxy/v2/cmd/server"),
    "kwok": Program("programs", "sigs.k8s.io/kwok/cmd/kwok"),
    "kstatus": Program("programs", "./kstatus"),
    # Without service discovery, which would bring the libraries of every cloud.
    "promtool": Program("programs", "github.com/prometheus/prometheus/cmd/promtool", tags="remove_all_sd"),
    "jobset": Program("jobset", "sigs.k8s.io/jobset"),
    "kueue": Program("kueue", "sigs.k8s.io/kueue/cmd/kueue"),
    "actionlint": Program("actionlint", "github.com/rhysd/actionlint/cmd/actionlint"),
}
"""Another program is one line here and `go get -tool PACKAGE@VERSION` in modules/programs, or a module of its own."""

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
    "kstatus",
)

CONTROLLERS: Final = ("kwok", "kueue")
"""What tests of scheduling and queues add: simulated nodes, and Kueue. JobSet is for a benchmark only."""

NODE_PROGRAMS: Final = ("kubelet", "kube-proxy", "coredns", "registry")
"""What a real node adds to the control plane's."""


def binary(name: str) -> Path:
    """Return the program, built first if the cache does not have it."""
    path = binary_path(name)
    if not path.exists():
        build([name])
    return path


def binary_path(name: str) -> Path:
    """Return the path of a program; it changes with everything that its module pins."""
    module = MODULES / PROGRAMS[name].module
    sources = sorted(path for path in module.rglob("*") if path.suffix in {".mod", ".sum", ".go"})
    key = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
    return CACHE / "bin" / f"{module.name}-{key}" / name


def build(names: Iterable[str]) -> None:
    """Build those that are missing; a second process that wants one waits, since two builds starve each other."""
    with lock(BUILD_LOCK):
        for name in names:
            if not (path := binary_path(name)).exists():
                started = time.monotonic()
                compile_program(PROGRAMS[name], path)
                say(f"built {name} in {time.monotonic() - started:.0f} s")


def compile_program(program: Program, path: Path) -> None:
    """Write the program to its place, all of it or nothing."""
    partial = ensure_folder(path.parent) / f"{path.name}.partial"
    flags = " ".join(["-s -w", *(f"-X {define}" for define in program.defines)])
    # What the linker would drop, the compiler need not make: a tenth of its time.
    options = ["-trimpath", f"-tags={program.tags}", "-ldflags", flags, "-gcflags=all=-dwarf=false"]
    argv = [go_program(), "build", *options, "-o", partial, program.package]
    run(argv, env=go_environment(), cwd=MODULES / program.module, timeout=BUILD_TIMEOUT)
    partial.rename(path)


def source(name: str) -> Path:
    """Return the folder of the module that a program comes from, fetched if the cache does not have it."""
    return fetch_source(PROGRAMS[name].module, f"sigs.k8s.io/{name}")


def fetch_source(module: str, path: str) -> Path:
    """Return the folder of a Go module at the version that one of ours pins, fetched if the cache does not have it."""
    download = [go_program(), "mod", "download", "-json", path]
    return Path(json.loads(run(download, env=go_environment(), cwd=MODULES / module))["Dir"])


def build_programs(names: Iterable[str]) -> None:
    """Build those that are missing, then drop the compiler's cache: 10 GB that the next start does not need."""
    if missing := [name for name in names if not binary_path(name).exists()]:
        say(f"building {', '.join(missing)} (up to a quarter of an hour on two cores, the first time)")
        build(missing)
    with lock(BUILD_LOCK):
        shutil.rmtree(CACHE / "go-build", ignore_errors=True)
