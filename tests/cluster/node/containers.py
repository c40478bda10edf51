"""containerd, with its images kept in the cache between clusters."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.cluster.host.commands import run, succeeds, wait_until
from tests.cluster.host.mounts import kill_containers
from tests.cluster.host.paths import CACHE, ensure_folder
from tests.cluster.host.processes import Processes
from tests.cluster.node.network import write_pod_network

IMAGE_ROOT: Final = CACHE / "containerd"
"""Images and their unpacked layers: one containerd at a time may use it."""

PAUSE_IMAGE: Final = "docker.io/local/pause:1"
"""What holds a pod's namespaces; pinned, or the garbage collector would have the node look for it elsewhere."""

CONFIG: Final = """\
version = 2
root = "{root}"
state = "{state}"
[grpc]
  address = "{socket}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  # Where CAP_SYS_RESOURCE is missing, no container could start with the score that the kubelet asks for.
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{network}"
"""


@dataclass(frozen=True)
class Containerd:
    """One containerd, whose state lies in the folder of its cluster."""

    folder: Path

    @property
    def socket(self) -> Path:
        """Where kubelet and ctr speak to it."""
        return self.folder / "containerd.sock"

    def ctr(self, *args: str | Path) -> str:
        """Run containerd's own client in the namespace that the kubelet uses."""
        return run(["ctr", "--address", self.socket, "--namespace", "k8s.io", *args])

    def images(self) -> dict[str, str]:
        """Return the digest of every image by reference; the Kubernetes side adds one named by its own digest."""
        rows = [line.split() for line in self.ctr("images", "list").splitlines()[1:]]
        return {row[0]: row[2] for row in rows}

    def remove_all_containers(self) -> bool:
        """Kill and forget every container; say whether there was one."""
        if self.all_removed():
            return False
        wait_until("end of the containers", self.all_removed, timeout=30)
        return True

    def all_removed(self) -> bool:
        """Try to remove what there is, and say whether nothing was left to do."""
        containers = self.ctr("containers", "list", "--quiet").split()
        tasks = self.ctr("tasks", "list", "--quiet").split()
        # containerd's Kubernetes side forgets a killed task too, and whoever comes second fails: look again.
        for kind, doomed in (("tasks", ["--force", *tasks]), ("containers", containers)):
            succeeds(["ctr", "--address", self.socket, "--namespace", "k8s.io", kind, "delete", *doomed])
        return not containers and not tasks


def start_containerd(folder: Path, processes: Processes) -> Containerd:
    """Start containerd without any container that an earlier cluster may have left in its store."""
    containerd = Containerd(ensure_folder(folder / "containerd"))
    network = write_pod_network(folder / "cni")
    config = containerd.folder / "config.toml"
    state = containerd.folder / "state"
    config.write_text(
        CONFIG.format(root=IMAGE_ROOT, state=state, socket=containerd.socket, pause=PAUSE_IMAGE, network=network)
    )
    processes.start("containerd", ["containerd", "--config", config])
    wait_until_up(containerd, processes)
    if containerd.remove_all_containers():
        # Its Kubernetes side read the old containers at start and would report them to the kubelet.
        processes.restart("containerd")
        wait_until_up(containerd, processes)
    return containerd


def wait_until_up(containerd: Containerd, processes: Processes) -> None:
    """Return when containerd answers."""

    def answers() -> bool:
        processes.check("containerd")
        return succeeds(["ctr", "--address", str(containerd.socket), "version"])

    wait_until("containerd", answers, timeout=60)


def stop_containers(folder: Path, processes: Processes) -> None:
    """Stop every container, through containerd if it still answers and by force if not."""
    containerd = Containerd(folder / "containerd")
    if processes.running("containerd"):
        containerd.remove_all_containers()
    kill_containers(containerd.socket)
