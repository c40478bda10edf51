"""The operator dies again and again while a job runs; the job does not notice."""

import random
import signal
import time
from functools import partial
from pathlib import Path
from typing import Final

import pytest

from tests.e2e.installation import OPERATOR_NAMESPACE, RELEASE, Installation, manifest_of, wait_for
from tests.e2e.pod_processes import read_process, send_signal

NAMESPACE: Final = "killed"
NAME: Final = "survivor"
LEAST_KILLS: Final = 10
LONGEST_LIFE: Final = 8.0
"""Seconds that the operator lives after its start or its election, at most: long enough to get something half done."""


def operator_processes() -> list[int]:
    """Ids, on the host, of the operator's processes in pods."""
    return [
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if b"-m\0qlora_operator" in read_process(path) and b"kubepods" in read_process(path.with_name("cgroup"))
    ]


def kill_operator(installation: Installation) -> None:
    """Kill it with SIGKILL, and delete its pod, so that the Deployment creates a new one without a back-off."""
    wait_for("an operator", operator_processes, 180)
    victims = operator_processes()
    send_signal(victims, signal.SIGKILL)
    for pod in installation.operator_pods():
        name = pod["metadata"]["name"]
        flags = [f"--namespace={OPERATOR_NAMESPACE}", "--grace-period=0", "--force", "--ignore-not-found"]
        installation.cluster.kubectl("delete", "pod", name, *flags)
    # The pods come back under other names, which would have to wait for the Lease of the dead one.
    installation.cluster.kubectl("delete", "lease", RELEASE, f"--namespace={OPERATOR_NAMESPACE}", "--ignore-not-found")
    wait_for("the death of the operator", lambda: not set(victims) & set(operator_processes()), 180)


def is_elected(installation: Installation) -> bool:
    """Whether an operator holds the Lease, whose last holder's was deleted."""
    lease = ["get", "lease", RELEASE, f"--namespace={OPERATOR_NAMESPACE}", "--ignore-not-found"]
    return bool(installation.cluster.kubectl(*lease, "--output=jsonpath={.spec.holderIdentity}").strip())


@pytest.mark.timeout(1500)
def test_a_job_survives_every_kill_of_the_operator(installation: Installation) -> None:
    """It is killed at random moments until the job has finished: while it prepares, trains, evaluates and publishes."""
    installation.make_namespace(NAMESPACE)
    training = {"maxSteps": 32, "globalBatchSize": 8}
    installation.submit(
        manifest_of(NAME, NAMESPACE, training=training, evaluation={"generations": 1}, dataset={"maxSamples": 260})
    )
    moments = random.Random()
    phases: list[str] = []
    seen: dict[str, set[str]] = {}
    deadline = time.monotonic() + 480
    while (phase := phase_of(installation)) not in {"Succeeded", "Failed"} and time.monotonic() < deadline:
        if len(phases) % 2:  # the other half of them dies during its start too, which may take longer than a life
            wait_for("an election", partial(is_elected, installation), 180)
        time.sleep(moments.uniform(0, LONGEST_LIFE))
        kill_operator(installation)
        phases.append(phase)
        for job in installation.children("jobs", NAME, NAMESPACE):
            seen.setdefault(job["metadata"]["name"], set()).add(job["metadata"]["uid"])
    print("killed while", ", ".join(phases))

    job = installation.wait_until_finished(NAME, NAMESPACE, 600)

    assert (job["status"]["phase"], job["status"]["reason"]) == ("Succeeded", "Published")
    assert len(phases) >= LEAST_KILLS
    assert "Training" in phases
    for child in installation.children("jobs", NAME, NAMESPACE):
        seen.setdefault(child["metadata"]["name"], set()).add(child["metadata"]["uid"])
    assert {name: len(uids) for name, uids in seen.items()} == {f"{NAME}-prepare": 1, f"{NAME}-1": 1}
    assert len(installation.children("pods", NAME, NAMESPACE)) == 2
    assert len(installation.children("configmaps", NAME, NAMESPACE)) == 2
    assert len(job["status"]["attempts"]) == 1


def phase_of(installation: Installation) -> str:
    return str(installation.job(NAME, NAMESPACE)["status"].get("phase", "Pending"))
