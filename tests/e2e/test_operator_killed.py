"""The operator dies ten times while a job runs; the job does not notice."""

import os
import random
import signal
import time
from pathlib import Path
from typing import Final

from tests.e2e.conftest import OPERATOR_NAMESPACE, Installation, manifest_of

NAMESPACE: Final = "killed"
NAME: Final = "survivor"
KILLS: Final = 10
LONGEST_LIFE: Final = 8.0
"""Seconds that the operator lives between two kills, at most: long enough to get something half done."""


def operator_processes() -> list[int]:
    """Ids, on the host, of the operator's processes on the node."""
    return [
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if path.exists() and b"-m\0qlora_operator" in path.read_bytes()
    ]


def kill_operator(installation: Installation) -> None:
    """Kill it without a word, and have the Deployment make a new pod at once instead of waiting out a back-off."""
    for process in operator_processes():
        os.kill(process, signal.SIGKILL)
    for pod in installation.operator_pods():
        name = pod["metadata"]["name"]
        installation.cluster.kubectl(
            "delete", "pod", name, f"--namespace={OPERATOR_NAMESPACE}", "--grace-period=0", "--force"
        )


def test_a_job_survives_ten_kills_of_the_operator(installation: Installation):
    installation.make_namespace(NAMESPACE)
    moments = random.Random(20)
    training = {"maxSteps": 24, "globalBatchSize": 8}
    installation.submit(
        manifest_of(NAME, NAMESPACE, training=training, evaluation={"generations": 1}, dataset={"maxSamples": 200})
    )
    seen: dict[str, set[str]] = {}
    for _ in range(KILLS):
        time.sleep(moments.uniform(0, LONGEST_LIFE))
        kill_operator(installation)
        for job in installation.children("jobs", NAME, NAMESPACE):
            seen.setdefault(job["metadata"]["name"], set()).add(job["metadata"]["uid"])

    job = installation.wait_until_finished(NAME, NAMESPACE, 600)

    assert (job["status"]["phase"], job["status"]["reason"]) == ("Succeeded", "Published")
    for child in installation.children("jobs", NAME, NAMESPACE):
        seen.setdefault(child["metadata"]["name"], set()).add(child["metadata"]["uid"])
    assert {name: len(uids) for name, uids in seen.items()} == {f"{NAME}-prepare": 1, f"{NAME}-1": 1}
    assert len(installation.children("pods", NAME, NAMESPACE)) == 2
    assert len(installation.children("configmaps", NAME, NAMESPACE)) == 2
    assert len(job["status"]["attempts"]) == 1
