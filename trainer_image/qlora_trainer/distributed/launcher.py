"""The processes of one pod among several: started by `accelerate launch`, stopped together, and one last word for all.

The pod's own process runs this. Signals go to the training processes themselves, because torch's launcher would give
them 30 seconds, and a checkpoint may need the pod's whole grace period.
"""

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil
from pydantic import ValidationError

from qlora_api.launcher_config import MAIN_PORT
from qlora_api.logs import log_fields
from qlora_api.names import ACCELERATE_CONFIG_FILE, MAIN_ADDRESS_ENV
from qlora_api.reasons import REASONS, Reason
from qlora_api.report import TerminationMessage
from qlora_api.runconfig import RunConfig
from qlora_api.v1alpha1 import Plan, to_timedelta
from qlora_trainer.errors import RunError
from qlora_trainer.runtime.rank import DONE_SUFFIX, RANK_PLACEHOLDER
from qlora_trainer.runtime.shutdown import StopFlag, interrupted_error
from qlora_trainer.runtime.termination_message import failure_message

INDEX_ENV: Final = "JOB_COMPLETION_INDEX"
"""The pod's number, which Kubernetes gives the pods of an Indexed Job."""
_ACCELERATE: Final = "accelerate.commands.launch"
_TRAINER: Final = "qlora_trainer"
_OOM_COUNTS: Final = (Path("/sys/fs/cgroup/memory.events"), Path("/sys/fs/cgroup/memory/memory.oom_control"))
"""Where the kernel counts the processes of this container that it killed for memory (cgroup v2 and v1)."""
_POLL_SECONDS: Final = 1.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Node:
    """One pod of a run."""

    plan: Plan
    index: int
    main_address: str
    """Address of the pod with the first process."""
    config: Path
    work: Path

    @property
    def messages_folder(self) -> Path:
        """Return the folder with the last words of this pod's processes."""
        return self.work / "last-words"


def observe_node(plan: Plan, config: Path, work: Path) -> Node:
    """Return this pod as its environment describes it."""
    environment = os.environ
    return Node(
        plan, int(environment.get(INDEX_ENV, "0")), environment.get(MAIN_ADDRESS_ENV, "127.0.0.1"), config, work
    )


def launch_workers(config: RunConfig, node: Node, stop: StopFlag) -> TerminationMessage | None:
    """Run this pod's processes to their end, and return their last word; None where another pod has it."""
    wait_for_address(node.main_address, to_timedelta(config.spec.deadlines.startup).total_seconds(), stop)
    node.messages_folder.mkdir(parents=True, exist_ok=True)
    for old in node.messages_folder.iterdir():
        old.unlink()
    process = subprocess.Popen(launch_command(node), env=os.environ | launch_environment(node))  # noqa: S603 (our own)
    with stop.deferred():
        code = _wait(process, node, stop)
    return choose_message(read_messages(node.messages_folder), code, oom_kill_count())


def wait_for_address(address: str, seconds: float, stop: StopFlag) -> None:
    """Wait until the first pod has an address: its name is unknown to the DNS before."""
    ends = time.monotonic() + seconds
    while not _resolves(address):
        if stop.requested:
            raise interrupted_error()
        if time.monotonic() > ends:
            raise RunError(
                Reason.COLLECTIVE_TIMEOUT,
                f"the first pod of the run, {address}, got no address within {seconds:g} s (spec.deadlines.startup)",
            )
        log.info("waiting for the first pod", extra=log_fields(address=address))
        time.sleep(_POLL_SECONDS)


def _resolves(address: str) -> bool:
    try:
        socket.getaddrinfo(address, MAIN_PORT)
    except socket.gaierror:
        return False
    return True


def launch_command(node: Node) -> list[str]:
    """Return the command line of `accelerate launch` on this node."""
    plan = node.plan
    threads = max(len(os.sched_getaffinity(0)) // plan.processes_per_node, 1)
    return [
        *(sys.executable, "-m", _ACCELERATE),
        *("--config_file", str(node.config.with_name(ACCELERATE_CONFIG_FILE))),
        *("--machine_rank", str(node.index)),
        *("--main_process_ip", node.main_address),
        *("--num_cpu_threads_per_process", str(threads)),
        *("-m", _TRAINER, "train"),
        *("--config", str(node.config)),
        *("--work", str(node.work)),
        *("--termination-message", str(node.messages_folder / f"{RANK_PLACEHOLDER}.json")),
    ]


def launch_environment(node: Node) -> dict[str, str]:
    """Return what the processes of a pod need to find each other, beside what the pod has."""
    plan = node.plan
    found = {
        # The pod network's interface; without a hint gloo asks the DNS for its own name, and NCCL may take any.
        "GLOO_SOCKET_IFNAME": "eth0",
        "NCCL_SOCKET_IFNAME": "eth0",
        "NCCL_DEBUG": "WARN",
        # A process whose peers are gone ends, and does not spin on its GPU.
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    }
    if plan.nodes == 1:
        found |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    if plan.device == "cpu":
        found["DS_ACCELERATOR"] = "cpu"
        # accelerate starts a CPU's process itself and leaves its number to whoever called it.
        found |= {"RANK": str(node.index), "WORLD_SIZE": str(plan.nodes), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    given = {name: os.environ[name] for name in found if name in os.environ and name.startswith(("NCCL_", "GLOO_"))}
    return found | given


def _wait(process: subprocess.Popen[bytes], node: Node, stop: StopFlag) -> int:
    """Wait for the end and return the exit code; pass a request to stop on to the training processes."""
    asked = False
    while (code := process.poll()) is None:
        if stop.requested and not asked:
            asked = True
            _send_sigterm(process.pid)
        if all_done(node):
            # torch's launcher would wait 300 seconds for the other pods, and hold this one's GPUs.
            process.kill()
            process.wait()
            return 0
        time.sleep(_POLL_SECONDS / 10)
    return code


def all_done(node: Node) -> bool:
    """Return whether every process of this pod ended well: it published, or leaves the last word to another one."""
    published = [word for word in read_messages(node.messages_folder).values() if word.reason is Reason.PUBLISHED]
    return len(published) + len(list(node.messages_folder.glob(f"*{DONE_SUFFIX}"))) == node.plan.processes_per_node


def _send_sigterm(launcher: int) -> None:
    for process in workers_of(launcher) or [psutil.Process(launcher)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGTERM)


def workers_of(launcher: int) -> list[psutil.Process]:
    """Return the training processes of a launcher that still run."""
    return [child for child in psutil.Process(launcher).children(recursive=True) if is_worker(_command_of(child))]


def _command_of(process: psutil.Process) -> list[str]:
    """Return a process's command line; one that has ended and was not waited for has none any more."""
    try:
        return list(process.cmdline())
    except psutil.NoSuchProcess:
        return []


def is_worker(command: Iterable[str]) -> bool:
    """Return whether a command line is a training process's, and not its launcher's, which has the same words."""
    words = list(command)
    return _TRAINER in words and _ACCELERATE not in words


def read_messages(folder: Path) -> dict[int, TerminationMessage]:
    """Return the last words by rank, in the order in which they were said."""
    words = {}
    for path in sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns):
        try:
            words[int(path.stem)] = TerminationMessage.model_validate_json(path.read_text())
        except (ValidationError, ValueError, OSError):
            continue
    return words


def choose_message(words: Mapping[int, TerminationMessage], code: int, killed: int) -> TerminationMessage | None:
    """Return what explains how a pod's processes ended; None where they ended well and another pod speaks."""
    if words:
        rank, word = min(words.items(), key=lambda told: _consequence_rank(told[1]))
        return _with_checkpoint(_with_rank(rank, word), words.values())
    if killed:
        why = "spec.resources.memory is too low: the kernel ended a process of the pod"
        return failure_message(RunError(Reason.HOST_OUT_OF_MEMORY, why))
    if code == 0:
        return None
    return failure_message(
        RunError(Reason.TRAINER_ERROR, f"the processes failed with exit code {code} and wrote no termination message")
    )


def _consequence_rank(word: TerminationMessage) -> int:
    """Return how far a word is from what decided the run; a publication decides it, whatever else was said."""
    return -1 if word.reason is Reason.PUBLISHED else REASONS[word.reason].consequence_rank


def _with_rank(rank: int, word: TerminationMessage) -> TerminationMessage:
    """Say whose word it is, where it is about a failure."""
    if word.reason is Reason.PUBLISHED:
        return word
    return word.model_copy(update={"message": f"rank {rank}: {word.message}"})


def _with_checkpoint(word: TerminationMessage, words: Iterable[TerminationMessage]) -> TerminationMessage:
    """Add the checkpoint that only the process knows that wrote it."""
    known = [told.checkpoint for told in words if told.checkpoint is not None]
    return word if word.reason is Reason.PUBLISHED or not known else word.model_copy(update={"checkpoint": known[0]})


def oom_kill_count() -> int:
    """Return how many processes of this container the kernel killed for memory."""
    for path in _OOM_COUNTS:
        try:
            fields = dict(line.split() for line in path.read_text().splitlines())
        except (OSError, ValueError):
            continue
        return int(fields.get("oom_kill", 0))
    return 0
