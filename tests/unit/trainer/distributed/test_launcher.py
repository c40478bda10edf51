"""Several pods on one machine: their launchers find each other, stop together, and write one termination message.

That they publish the same result as one process is tested in tests/e2e/test_gang.py.
"""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from qlora_api.launcher_config import accelerate_config
from qlora_api.names import ACCELERATE_CONFIG_FILE
from qlora_api.reasons import Reason
from qlora_api.report import TerminationMessage
from qlora_api.runconfig import RunConfig
from qlora_api.v1alpha1 import Checkpoint, Plan
from qlora_trainer.distributed.launcher import (
    INDEX_ENV,
    Node,
    choose_message,
    is_worker,
    launch_command,
    wait_for_address,
    workers_of,
)
from qlora_trainer.errors import RunError, StopRequested
from qlora_trainer.prepare import prepare
from qlora_trainer.runtime.shutdown import StopFlag
from qlora_trainer.storage.store import local_path
from tests.unit.trainer.tiny import prepare_config, run_config, write_job

STEPS = 6


def failure(reason: Reason, text: str = "") -> TerminationMessage:
    return TerminationMessage(reason=reason, message=text)


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        pytest.param([failure(Reason.PUBLISHED)], "Published: ", id="published"),
        pytest.param(
            [failure(Reason.COLLECTIVE_TIMEOUT, "peer"), failure(Reason.CUDA_OUT_OF_MEMORY, "24 GiB")],
            "CudaOutOfMemory: rank 1: 24 GiB",
            id="cause-after-its-consequence",
        ),
        pytest.param(
            [failure(Reason.S3_DENIED, "a"), failure(Reason.NON_FINITE_LOSS, "b")],
            "S3Denied: rank 0: a",
            id="first-of-equals",
        ),
        pytest.param(
            [failure(Reason.COLLECTIVE_TIMEOUT, "peer"), failure(Reason.INTERRUPTED, "stop")],
            "Interrupted: rank 1: stop",
            id="stop-explains-lost-peer",
        ),
        pytest.param(
            [failure(Reason.COLLECTIVE_TIMEOUT, "peer")], "CollectiveTimeout: rank 0: peer", id="only-consequence"
        ),
    ],
)
def test_choose_message_picks_the_root_cause(messages: list[TerminationMessage], expected: str) -> None:
    chosen = choose_message(dict(enumerate(messages)), 1, 0)
    assert chosen is not None
    assert f"{chosen.reason}: {chosen.message}" == expected


def test_chosen_message_has_the_checkpoint_of_another_rank() -> None:
    checkpoint = Checkpoint(step=4, uri="s3://b/c", time=datetime(2026, 1, 2, tzinfo=UTC))
    first = failure(Reason.COLLECTIVE_TIMEOUT).model_copy(update={"checkpoint": checkpoint})
    chosen = choose_message({0: first, 1: failure(Reason.CUDA_OUT_OF_MEMORY)}, 1, 0)
    assert chosen is not None
    assert (chosen.reason, chosen.checkpoint) == (Reason.CUDA_OUT_OF_MEMORY, checkpoint)


def test_workers_without_message_are_explained_by_exit_code_or_oom() -> None:
    assert choose_message({}, 0, 0) is None
    killed, crashed = choose_message({}, 1, 1), choose_message({}, -11, 0)
    assert killed is not None
    assert killed.reason is Reason.HOST_OUT_OF_MEMORY
    assert crashed is not None
    assert (crashed.reason, "exited with code -11" in crashed.message) == (Reason.TRAINER_ERROR, True)


def test_unresolvable_main_address_times_out() -> None:
    with pytest.raises(RunError, match=r"nobody\.invalid, got no address within 0 s \(spec\.deadlines\.startup\)"):
        wait_for_address("nobody.invalid", 0, StopFlag())


def test_stop_ends_the_wait_for_the_main_address() -> None:
    stop = StopFlag()
    stop.requested = True
    with pytest.raises(StopRequested):
        wait_for_address("nobody.invalid", 60, stop)


def test_launcher_is_not_counted_as_worker(tmp_path: Path) -> None:
    node = Node(plan_of("zero2"), 1, "10.0.0.1", tmp_path / "run.json", tmp_path)
    assert not is_worker(launch_command(node))
    assert is_worker([sys.executable, "-u", "-m", "qlora_trainer", "train", "--config", "run.json"])


LAUNCHER = """
import subprocess, sys, time
ended = subprocess.Popen([sys.executable, "-c", "", "qlora_trainer"])
runs = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "qlora_trainer"])
while open(f"/proc/{ended.pid}/stat").read().split()[2] != "Z":
    time.sleep(0.01)
print(runs.pid, flush=True)
time.sleep(60)
"""
"""Has a zombie and a running worker."""


def test_exited_worker_gets_no_sigterm() -> None:
    with subprocess.Popen([sys.executable, "-c", LAUNCHER], stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout
        running = int(launcher.stdout.readline())
        found = workers_of(launcher.pid)
        for process in (*found, launcher):
            process.kill()
    assert [process.pid for process in found] == [running]


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """A prepared run with validations and checkpoints."""
    folder = tmp_path / "job"
    blocks = {"training": {"evaluateEvery": 3}, "evaluation": {"generations": 3}, "lora": {"dropout": 0}}
    spec = write_job(folder, checkpoint={"steps": 2}, **blocks)
    return run_config(spec, prepare(prepare_config(spec), work=folder / "work"), total_steps=STEPS)


def plan_of(strategy: str, steps: int = STEPS) -> Plan:
    return Plan(
        device="cpu",
        nodes=2,
        gpus_per_node=0,
        strategy=strategy,
        micro_batch_size=4,
        gradient_accumulation=1,
        total_steps=steps,
    )


def free_port() -> int:
    """A port outside the kernel's ephemeral range, so that no other connection takes it meanwhile."""
    for port in random.sample(range(20_000, 32_000), 100):
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("", port))
            return port
    raise AssertionError("no port is free")


class Pods:
    """Two launchers with separate folders and a common output."""

    def __init__(self, config: RunConfig, plan: Plan, folder: Path) -> None:
        self.folder = folder
        self.config = config.model_copy(update={"plan": plan})
        (folder / "run.json").write_text(self.config.model_dump_json(by_alias=True))
        accelerate = accelerate_config(self.config.plan) | {"main_process_port": free_port()}
        if "deepspeed_config" in accelerate:
            accelerate["deepspeed_config"]["deepspeed_config_file"] = str(folder / "deepspeed.json")
            (folder / "deepspeed.json").write_text("{}")
        (folder / ACCELERATE_CONFIG_FILE).write_text(json.dumps(accelerate))
        self.processes = [self._start(index) for index in (0, 1)]

    def _start(self, index: int) -> subprocess.Popen[bytes]:
        environment = {INDEX_ENV: str(index), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        paths = ["--config", self.folder / "run.json", "--work", self.folder / f"work-{index}"]
        message = ["--termination-message", self.folder / f"message-{index}.json"]
        command = [sys.executable, "-m", "qlora_trainer", "launch", *paths, *message]
        with (self.folder / f"log-{index}").open("w") as log:
            return subprocess.Popen(command, env=os.environ | environment, stdout=log, stderr=subprocess.STDOUT)

    def wait(self) -> list[int]:
        try:
            return [process.wait(timeout=600) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
                process.wait()

    def message(self, index: int) -> TerminationMessage | None:
        path = self.folder / f"message-{index}.json"
        return TerminationMessage.model_validate_json(path.read_text()) if path.exists() else None

    def log(self, index: int) -> str:
        return (self.folder / f"log-{index}").read_text()

    def uploaded_lines(self, index: int) -> list[str]:
        """The uploaded log of a pod: of its launcher and of its worker."""
        folder = local_path(self.config.spec.output.uri) / self.config.job / "logs"
        names = [f"attempt-1-node-{index}.jsonl", f"attempt-1-node-{index}-rank-{index}.jsonl"]
        return sorted(line for name in names for line in (folder / name).read_text().splitlines())


def test_sigterm_of_one_pod_saves_a_checkpoint_and_stops_both(config: RunConfig, tmp_path: Path) -> None:
    pods = Pods(config, plan_of("zero2", steps=2000), tmp_path)
    while '"step": 1' not in pods.log(0) and pods.processes[0].poll() is None:
        time.sleep(0.1)
    pods.processes[1].send_signal(signal.SIGTERM)
    assert pods.wait() == [143, 143], pods.log(0)[-3000:] + pods.log(1)[-3000:]
    reasons = [message.reason if (message := pods.message(index)) else None for index in (0, 1)]
    assert reasons == [Reason.INTERRUPTED, Reason.INTERRUPTED]
    lines = [json.loads(line) for line in pods.log(0).splitlines() if line.startswith("{")]
    assert {line.get("rank") for line in lines} == {0, None}, "each line of a worker has its rank"
    assert list(tmp_path.rglob("checkpoints/step-*/manifest.json"))
    for index in (0, 1):
        assert pods.uploaded_lines(index) == sorted(
            line for line in pods.log(index).splitlines() if line.startswith("{")
        )
