"""Logs of several pods at once: a thread for each, one queue for all."""

import queue
import threading
from collections.abc import Callable, Iterable, Mapping

from qlora_cli.cluster import Cluster, ClusterError
from qlora_cli.pods import TrainerPod


class Streams:
    """Follows pods; lines of one pod keep their order."""

    def __init__(self, cluster: Cluster, namespace: str, query: Mapping[str, str]) -> None:
        self._cluster = cluster
        self._namespace = namespace
        self._query = query
        self._threads: dict[str, threading.Thread] = {}
        self._lines: queue.Queue[tuple[TrainerPod, str]] = queue.Queue()

    @property
    def running(self) -> bool:
        """Whether a pod may have more to say."""
        return any(thread.is_alive() for thread in self._threads.values())

    @property
    def opened(self) -> bool:
        """Whether there was a pod to follow."""
        return bool(self._threads)

    def open(self, pods: Iterable[TrainerPod]) -> None:
        """Follow these pods, unless they are followed already."""
        for pod in pods:
            if pod.name not in self._threads:
                thread = threading.Thread(target=self._read, args=(pod,), name=pod.name, daemon=True)
                self._threads[pod.name] = thread
                thread.start()

    def drain(self, show: Callable[[TrainerPod, str], None]) -> None:
        """Show what has come in."""
        while not self._lines.empty():
            show(*self._lines.get())

    def _read(self, pod: TrainerPod) -> None:
        try:
            for line in self._cluster.log(self._namespace, pod.name, self._query):
                self._lines.put((pod, line))
        except ClusterError as error:
            self._lines.put((pod, f"(the log ends here: {error})"))
