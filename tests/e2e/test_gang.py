"""Two pods with a process each train one adapter on the real node: DDP, ZeRO-2 and ZeRO-3, and one of them dies.

What the strategies learn is compared on a model of two layers: dividing a larger one shows nothing else.
"""

import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import pytest

from tests.e2e import tiny
from tests.e2e.installation import Installation, download, manifest_of, measure, wait_for
from tests.e2e.pod_processes import alive, processes_of, send_signal
from tests.gpu_time import check_gpu_time

NAMESPACE: Final = "gang"
SECONDS: Final = 600
"""For one run, on two cores that also run the cluster."""
STRATEGIES: Final = ("ddp", "zero2", "zero3")
TURNS: Final = (("single", "ddp"), ("zero2", "zero3"))
"""What runs at a time: the pods of all four would not find the memory that they ask for."""
LONGEST_GOODBYE: Final = 60.0
"""Seconds from the death of one pod to the end of the other one."""
LONG_RUN_STEPS: Final = 300
"""Steps of the small model that take much longer than what is reported of them: it is killed on the way."""
CHECKPOINT_STEPS: Final = 20


def gang_manifest(name: str, nodes: int, distribution: str, **blocks: Mapping[str, Any]) -> dict[str, Any]:
    """A short run with NF4, whose result does not depend on which process draws random numbers."""
    defaults: dict[str, Mapping[str, Any]] = {
        "dataset": {"maxSamples": 120, "evaluation": {"fraction": 0.2}},
        "lora": {"dropout": 0},
        "training": {"maxSteps": 4, "globalBatchSize": 16},
        "resources": {"nodes": nodes, "cpu": "300m", "memory": "5Gi"},
        "evaluation": {"generations": 0},
    }
    manifest = manifest_of(name, NAMESPACE, **{**defaults, **blocks})
    manifest["spec"]["distribution"] = distribution
    return manifest


def tiny_manifest(strategy: str) -> dict[str, Any]:
    """Four steps of sixteen rows."""
    training = {**tiny.BLOCKS["training"], "maxSteps": 4, "globalBatchSize": 16}
    nodes, distribution = (1, "auto") if strategy == "single" else (2, strategy)
    resources = {"nodes": nodes, "cpu": "300m", "memory": "3Gi"}
    return gang_manifest(strategy, nodes, distribution, **{**tiny.BLOCKS, "training": training, "resources": resources})


@pytest.fixture(scope="module")
def tiny_files(installation: Installation, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The small model and its rows, on disk as in S3."""
    return tiny.put_tiny_model(installation.cluster, tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def runs(installation: Installation, tiny_files: tuple[Path, Path]) -> dict[str, dict[str, Any]]:  # noqa: ARG001
    """The finished QLoRAJobs by strategy."""
    installation.make_namespace(NAMESPACE)
    found = {}
    for strategies in TURNS:
        for strategy in strategies:
            installation.submit(tiny_manifest(strategy))
        for strategy in strategies:
            found[strategy] = installation.wait_until_finished(strategy, NAMESPACE, SECONDS)
    return found


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_distributed_strategy_matches_single_process_loss(runs: dict[str, dict[str, Any]], strategy: str) -> None:
    status, alone = runs[strategy]["status"], runs["single"]["status"]
    assert (status["phase"], status["reason"]) == ("Succeeded", "Published")
    assert (status["plan"]["nodes"], status["plan"]["strategy"]) == (2, strategy)
    losses = [job["evaluation"]["adapter"]["loss"] for job in (status, alone)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-2)
    assert status["evaluation"]["base"]["loss"] == pytest.approx(alone["evaluation"]["base"]["loss"], abs=1e-2)
    assert losses[0] < status["evaluation"]["base"]["loss"] - 0.05, "four steps are seen in the loss"
    assert status["evaluation"]["rows"] == alone["evaluation"]["rows"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_pods_trained_it(installation: Installation, runs: dict[str, dict[str, Any]], strategy: str) -> None:
    assert len(runs[strategy]["status"]["attempts"]) == 1
    hosts = {pod["spec"]["hostname"] for pod in training_pods(installation, strategy)}
    assert hosts == {f"{strategy}-1-0", f"{strategy}-1-1"}
    # The termination message is reported a moment before its process ends.
    wait_for("the end of both", lambda: phases_of(installation, strategy) == {"Succeeded"}, 180)
    check_usage(installation, strategy)


def test_sharded_training_publishes_loadable_adapter(
    installation: Installation, runs: dict[str, dict[str, Any]], tiny_files: tuple[Path, Path], tmp_path: Path
) -> None:
    """Computed by a script that uses only peft."""
    adapters = [
        download(installation, runs[strategy]["status"]["output"]["adapter"], tmp_path / strategy)
        for strategy in ("single", "zero3")
    ]
    model, rows = tiny_files
    measured = measure(model, rows, *adapters)
    alone, divided = measured["adapters"]
    assert divided < measured["base"]
    assert divided == pytest.approx(alone, abs=1e-2)


def training_pods(installation: Installation, name: str) -> list[dict[str, Any]]:
    pods = installation.children("pods", name, NAMESPACE)
    return [pod for pod in pods if pod["metadata"]["labels"]["qlora.dev/role"] == "train"]


def phases_of(installation: Installation, name: str) -> set[str]:
    return {pod["status"]["phase"] for pod in training_pods(installation, name)}


@pytest.mark.usefixtures("tiny_files")
def test_pod_killed_gang_resumes_once_from_checkpoint(installation: Installation) -> None:
    installation.make_namespace(NAMESPACE)
    name = "killed-pod"
    training = {**tiny.BLOCKS["training"], "epochs": 100, "maxSteps": LONG_RUN_STEPS, "globalBatchSize": 8}
    blocks = {**tiny.BLOCKS, "training": training, "checkpoint": {"steps": CHECKPOINT_STEPS}}
    installation.submit(gang_manifest(name, 2, "ddp", **blocks))
    wait_for("a checkpoint", lambda: checkpointed_step_of(installation, name) > 0, SECONDS)
    victim, survivor = processes_of(f"{name}-1-1"), processes_of(f"{name}-1-0")
    assert victim
    assert survivor
    send_signal(victim, signal.SIGKILL)
    died = time.monotonic()
    wait_for("the end of the other pod", lambda: not alive(survivor), LONGEST_GOODBYE)
    print(f"the other pod was gone after {time.monotonic() - died:.0f} s")
    job = installation.wait_until_finished(name, NAMESPACE, SECONDS)
    status = job["status"]
    assert (status["phase"], status["step"]) == ("Succeeded", f"{LONG_RUN_STEPS}/{LONG_RUN_STEPS}")
    assert [attempt["reason"] for attempt in status["attempts"]] == ["Interrupted", "Published"]
    assert "was killed" in status["attempts"][0]["message"]
    jobs = {job["metadata"]["name"] for job in installation.children("jobs", name, NAMESPACE)}
    assert jobs == {f"{name}-prepare", f"{name}-1", f"{name}-2"}
    log = installation.cluster.kubectl("logs", f"--namespace={NAMESPACE}", f"job/{name}-2", "--container=trainer")
    assert "resumed from step" in log
    check_usage(installation, name)


def check_usage(installation: Installation, name: str) -> None:
    """What the status accounts is what the kubelet saw, once the operator has seen the end of all pods."""
    wait_for("the account", lambda: not holding(installation, name), 180)
    check_gpu_time(installation.job(name, NAMESPACE)["status"], training_pods(installation, name))


def holding(installation: Installation, name: str) -> list[dict[str, Any]]:
    attempts = installation.job(name, NAMESPACE)["status"]["attempts"]
    return [pod for attempt in attempts for pod in attempt["usage"]["holding"]]


def checkpointed_step_of(installation: Installation, name: str) -> int:
    return int(installation.job(name, NAMESPACE)["status"].get("checkpoint", {}).get("step", 0))
