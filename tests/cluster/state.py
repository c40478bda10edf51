"""What is written down about a running cluster, so that another process can use it, stop it or clean up after it."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.cluster.host.mounts import remove_folder
from tests.cluster.host.paths import CACHE, STATES, ensure_folder
from tests.cluster.host.processes import Processes, ProcessId
from tests.cluster.host.progress import say
from tests.cluster.node.containers import stop_containers
from tests.cluster.node.network import remove_network
from tests.cluster.node.node import remove_pod_cgroups
from tests.cluster.services.s3 import S3

START_LOCK: Final = CACHE / "start.lock"
"""The lock under which clusters are claimed and cleaned up."""

NODE_PROGRAMS: Final = ("kube-proxy", "coredns", "kubelet")
"""Stopped before the containers are, or they would start them again."""


@dataclass(frozen=True)
class State:
    """The folder of one cluster."""

    folder: Path

    @property
    def name(self) -> str:
        """The cluster's name."""
        return self.folder.name

    @property
    def has_node(self) -> bool:
        """Whether the cluster has, or began to have, this machine's one real node."""
        return (self.folder / "containerd").exists()

    def claim(self) -> None:
        """Make the cluster end with this process, at the latest when the next one cleans up."""
        ensure_folder(self.folder)
        (self.folder / "owner.json").write_text(json.dumps(vars(ProcessId.of(os.getpid()))))

    def detach(self) -> None:
        """Let the cluster run until somebody stops it."""
        (self.folder / "owner.json").write_text("null")

    def detached(self) -> bool:
        """Say whether the cluster waits for somebody to stop it."""
        owner = self.folder / "owner.json"
        return owner.exists() and owner.read_text() == "null"

    def take_node(self) -> None:
        """Write down that this cluster has the node."""
        ensure_folder(self.folder / "containerd")

    def abandoned(self) -> bool:
        """Say whether the process that would have stopped the cluster is gone."""
        owner = self.folder / "owner.json"
        if not owner.exists():
            return True
        values = json.loads(owner.read_text() or "{}")
        return values is not None and not ProcessId(**{"pid": 0, "started": "", **values}).alive()

    def remember_s3(self, s3: S3) -> None:
        """Write down where the S3 server is."""
        (self.folder / "s3.json").write_text(json.dumps(s3.values()))

    def recall_s3(self) -> S3 | None:
        """Return where the S3 server is, if the cluster has one."""
        path = self.folder / "s3.json"
        return S3(**json.loads(path.read_text())) if path.exists() else None

    def stop(self) -> None:
        """End everything that the cluster started and remove what it wrote, whether or not it was ever complete."""
        processes = Processes(self.folder)
        for program in NODE_PROGRAMS:
            if processes.running(program):
                processes.stop(program)
        if self.has_node:
            stop_containers(self.folder, processes)
        processes.stop_all()
        if self.has_node:
            remove_network()
            remove_pod_cgroups()
        remove_folder(self.folder)


def find_state(name: str) -> State:
    """Return the state of the cluster of this name, which may not exist."""
    return State(STATES / name)


def all_states() -> list[State]:
    """Return what is written down about every cluster of this machine."""
    return [State(folder) for folder in sorted(STATES.glob("*")) if folder.is_dir()]


def remove_abandoned() -> None:
    """Clean up after clusters whose owner was killed."""
    for state in all_states():
        if state.abandoned():
            say(f"cleaning up after {state.name}, whose owner is gone")
            state.stop()
