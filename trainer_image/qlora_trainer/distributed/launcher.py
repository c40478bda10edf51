"""Starts a pod's worker processes with `accelerate launch`, forwards SIGTERM, and picks one termination message.

Runs as the pod's main process. SIGTERM goes directly to the workers, because torch's launcher would kill them after
30 seconds, and a checkpoint may need the pod's full grace period.
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
from qlora_api.logs.formatters import log_fields
from qlora_api.names import ACCELERATE_CONFIG_FILE, MAIN_ADDRESS_ENV
from qlora_api.reasons import REASONS, Reason
from qlora_api.report import UNEXPLAINED_EXIT, TerminationMessage
from qlora_api.runconfig import RunConfig
from qlora_api.v1alpha1 import Plan, to_timedelta
from qlora_trainer.errors import RunError, StopRequested
from qlora_trainer.runtime.rank import DONE_SUFFIX, RANK_PLACEHOLDER
from qlora_trainer.runtime.shutdown import StopFlag
from qlora_trainer.runtime.termination_message import failure_message

INDEX_ENV: Final = "JOB_COMPLETION_INDEX"
"""Index of the pod, which Kubernetes sets in the pods of an Indexed Job."""
_ACCELERATE: Final = "accelerate.commands.launch"
_TRAINER: Final = "qlora_trainer"
_OOM_COUNTS: Final = (Path("/sys/fs/cgroup/memory.events"), Path("/sys/fs/cgroup/memory/memory.oom_control"))
"""Files with the OOM kill count of this container (cgroup v2 and v1)."""
_POLL_SECONDS: Final = 1.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Node:
    """One pod of a multi-process run."""

    plan: Plan
    index: int
    main_address: str
    """Address of the pod with rank 0."""
    config: Path
    work: Path

    @property
    def messages_folder(self) -> Path:
        """Return the folder with the termination messages of this pod's workers."""
        return self.work / "termination-messages"


def observe_node(plan: Plan, config: Path, work: Path) -> Node:
    """Read this pod's index and main address from the environment."""
    environment = os.environ
    return Node(
        plan, int(environment.get(INDEX_ENV, "0")), environment.get(MAIN_ADDRESS_ENV, "127.0.0.1"), config, work
    )


def launch_workers(config: RunConfig, node: Node, stop: StopFlag) -> TerminationMessage | None:
    """Run this pod's workers until they exit, and return their termination message; None if another pod writes it."""
    wait_for_address(node.main_address, to_timedelta(config.spec.deadlines.startup).total_seconds(), stop)
    node.messages_folder.mkdir(parents=True, exist_ok=True)
    for old in node.messages_folder.iterdir():
        old.unlink()
    process = subprocess.Popen(launch_command(node), env=os.environ | launch_environment(node))  # noqa: S603 (our own)
    with stop.deferred():
        code = _wait(process, node, stop)
    return choose_message(read_messages(node.messages_folder), code, oom_kill_count())


def wait_for_address(address: str, seconds: float, stop: StopFlag) -> None:
    """Wait until the DNS resolves the name of the first pod."""
    deadline = time.monotonic() + seconds
    while not _resolves(address):
        if stop.requested:
            raise StopRequested
        if time.monotonic() > deadline:
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
    """Return the variables that the workers need to find each other, in addition to the pod's own."""
    plan = node.plan
    defaults = {
        # The pod network's interface; without it gloo resolves its own hostname, and NCCL may pick any interface.
        "GLOO_SOCKET_IFNAME": "eth0",
        "NCCL_SOCKET_IFNAME": "eth0",
        "NCCL_DEBUG": "WARN",
        # A worker that lost its peers exits instead of spinning on its GPU.
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    }
    if plan.nodes == 1:
        defaults |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    if plan.device == "cpu":
        defaults["DS_ACCELERATOR"] = "cpu"
        # On a CPU accelerate starts the process itself, and leaves the rank variables to the caller.
        defaults |= {"RANK": str(node.index), "WORLD_SIZE": str(plan.nodes), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    tunable = [name for name in defaults if name.startswith(("NCCL_", "GLOO_"))]
    return defaults | {name: os.environ[name] for name in tunable if name in os.environ}


def _wait(process: subprocess.Popen[bytes], node: Node, stop: StopFlag) -> int:
    """Wait for the launcher and return its exit code; forward SIGTERM to the workers once."""
    forwarded = False
    while (code := process.poll()) is None:
        if stop.requested and not forwarded:
            forwarded = True
            _send_sigterm(process.pid)
        if all_done(node):
            # torch's launcher would wait 300 seconds for the other pods, and keep this pod's GPUs allocated.
            process.kill()
            process.wait()
            return 0
        time.sleep(_POLL_SECONDS / 10)
    return code


def all_done(node: Node) -> bool:
    """Return whether every worker of this pod is done: it published, or left a done file."""
    messages = read_messages(node.messages_folder).values()
    published = [message for message in messages if message.reason is Reason.PUBLISHED]
    return len(published) + len(list(node.messages_folder.glob(f"*{DONE_SUFFIX}"))) == node.plan.processes_per_node


def _send_sigterm(launcher: int) -> None:
    for process in workers_of(launcher) or [psutil.Process(launcher)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGTERM)


def workers_of(launcher: int) -> list[psutil.Process]:
    """Return the running worker processes of a launcher."""
    return [child for child in psutil.Process(launcher).children(recursive=True) if is_worker(_command_of(child))]


def _command_of(process: psutil.Process) -> list[str]:
    """Return a process's command line; empty if it has exited (a zombie)."""
    try:
        return list(process.cmdline())
    except psutil.NoSuchProcess:
        return []


def is_worker(command: Iterable[str]) -> bool:
    """Return whether a command line is a worker's; the launcher's has the same arguments."""
    arguments = list(command)
    return _TRAINER in arguments and _ACCELERATE not in arguments


def read_messages(folder: Path) -> dict[int, TerminationMessage]:
    """Return the termination messages by rank, oldest first."""
    messages = {}
    for path in sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns):
        try:
            messages[int(path.stem)] = TerminationMessage.model_validate_json(path.read_text())
        except (ValidationError, ValueError, OSError):
            continue
    return messages


def choose_message(messages: Mapping[int, TerminationMessage], code: int, killed: int) -> TerminationMessage | None:
    """Return the message closest to the root cause; None if all workers exited with 0 and another pod writes it."""
    if messages:
        rank, message = min(messages.items(), key=lambda entry: _consequence_rank(entry[1]))
        return _with_checkpoint(_with_rank(rank, message), messages.values())
    if killed:
        why = "spec.resources.memory is too low: the kernel's OOM killer ended a process of the pod"
        return failure_message(RunError(Reason.HOST_OUT_OF_MEMORY, why))
    if code == 0:
        return None
    return failure_message(
        RunError(Reason.TRAINER_ERROR, f"the worker processes exited with code {code} and {UNEXPLAINED_EXIT}")
    )


def _consequence_rank(message: TerminationMessage) -> int:
    """Return how far a message is from the root cause; Published wins over all others."""
    return -1 if message.reason is Reason.PUBLISHED else REASONS[message.reason].consequence_rank


def _with_rank(rank: int, message: TerminationMessage) -> TerminationMessage:
    """Prefix a failure with the rank that reported it."""
    if message.reason is Reason.PUBLISHED:
        return message
    return message.model_copy(update={"message": f"rank {rank}: {message.message}"})


def _with_checkpoint(message: TerminationMessage, messages: Iterable[TerminationMessage]) -> TerminationMessage:
    """Add the newest checkpoint, which only the main process knows."""
    known = [other.checkpoint for other in messages if other.checkpoint is not None]
    if message.reason is Reason.PUBLISHED or not known:
        return message
    return message.model_copy(update={"checkpoint": known[0]})


def oom_kill_count() -> int:
    """Return how many processes of this container the OOM killer ended."""
    for path in _OOM_COUNTS:
        try:
            fields = dict(line.split() for line in path.read_text().splitlines())
        except (OSError, ValueError):
            continue
        return int(fields.get("oom_kill", 0))
    return 0
