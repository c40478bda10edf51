"""Two installations that watch the same namespace: one serves it, the other says so and takes over when it is gone."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qlora_operator.resources.event import INSTALLATION_REASON
from tests.chaos.promises import promise
from tests.cluster.cluster import Cluster
from tests.cluster.host.commands import wait_until
from tests.integration.operator_process import (
    OPERATOR_NAMESPACE,
    PREPARE,
    JobNamespace,
    Operator,
    install,
    open_job_namespace,
)
from tests.make import PREPARED_MESSAGE

Start = Callable[..., Operator]


@pytest.fixture
def job_namespace(control_plane: Cluster, request: pytest.FixtureRequest) -> Iterator[JobNamespace]:
    install(control_plane)
    with open_job_namespace(control_plane, request.node.name) as job_namespace:
        yield job_namespace


@pytest.fixture
def start(control_plane: Cluster, tmp_path: Path, job_namespace: JobNamespace) -> Iterator[Start]:
    """Start an installation by the name of its Lease."""
    operators: dict[str, Operator] = {}

    def start(lease: str, *namespaces: str) -> Operator:
        pod = f"{lease}-{len(operators)}"
        (tmp_path / pod).mkdir()
        control_plane.kubectl("run", pod, "--image=operator:test", f"--namespace={OPERATOR_NAMESPACE}")
        watched = ",".join(namespaces or (job_namespace.namespace,))
        identity = {"POD_NAMESPACE": OPERATOR_NAMESPACE, "POD_NAME": pod, "QLORA_LEASE": lease}
        operators[pod] = Operator(control_plane, tmp_path / pod, watched, **identity)
        return operators[pod].start()

    yield start
    for operator in operators.values():
        operator.stop_and_check_log()
    control_plane.kubectl("delete", "pods", *operators, f"--namespace={OPERATOR_NAMESPACE}", "--now")
    leases = {name.rpartition("-")[0] for name in operators}
    control_plane.kubectl("delete", "leases", *leases, f"--namespace={OPERATOR_NAMESPACE}", "--ignore-not-found")


def is_served(operator: Operator, namespace: str) -> bool:
    return f'qlora_operator_namespace_served{{namespace="{namespace}"}} 1.0' in operator.metrics()


def wait_until_left(operator: Operator, namespace: str, lease: str) -> str:
    """Wait until an installation says that it leaves a namespace to another one, and return the sentence."""
    message = f"namespace {namespace} is served by installation {OPERATOR_NAMESPACE}/{lease}"
    wait_until("it is reported", lambda: message in operator.log.read_text(), timeout=60)
    return message


def wait_for_claim(job_namespace: JobNamespace, name: str, lease: str) -> None:
    claim = f"{OPERATOR_NAMESPACE}/{lease}"
    wait_until(f"{name} is of {lease}", lambda: job_namespace.status(name).get("operator") == claim, timeout=60)


def test_second_installation_leaves_the_namespace_and_takes_over_when_the_first_is_uninstalled(
    job_namespace: JobNamespace, control_plane: Cluster, start: Start
) -> None:
    namespace = job_namespace.namespace
    first = start("first")
    job_namespace.submit()
    wait_for_claim(job_namespace, "support-bot", "first")
    second = start("second")
    message = wait_until_left(second, namespace, "first")
    job_namespace.submit("another")
    wait_for_claim(job_namespace, "another", "first")
    assert (is_served(first, namespace), is_served(second, namespace)) == (True, False)
    assert second.healthy()
    events = [event for event in job_namespace.items("events") if event["reason"] == INSTALLATION_REASON]
    assert [event["note"].partition(",")[0] for event in events] == [message]
    before = job_namespace.jobs()
    # A rolling upgrade of the first one is no takeover.
    assert first.terminate() == 0
    first = start("first")
    job_namespace.end_pod(PREPARE, 0, PREPARED_MESSAGE)
    job_namespace.wait_for("Scheduling")
    assert job_namespace.status()["operator"] == f"{OPERATOR_NAMESPACE}/first"
    assert not is_served(second, namespace)
    # Uninstalled, with its Lease.
    assert first.terminate() == 0
    control_plane.kubectl("delete", "lease", "first", f"--namespace={OPERATOR_NAMESPACE}")
    wait_for_claim(job_namespace, "support-bot", "second")
    wait_for_claim(job_namespace, "another", "second")
    wait_until("it is served", lambda: is_served(second, namespace))
    assert before.items() <= job_namespace.jobs().items()
    # Installed again, it is the second one.
    again = start("first")
    job_namespace.submit("third")
    wait_for_claim(job_namespace, "third", "second")
    wait_until_left(again, namespace, "second")


def test_namespace_changes_hands_when_the_first_installation_no_longer_watches_it(
    job_namespace: JobNamespace, control_plane: Cluster, start: Start
) -> None:
    first = start("cluster", job_namespace.namespace, "default")
    job_namespace.submit()
    wait_for_claim(job_namespace, "support-bot", "cluster")
    second = start("team")
    wait_until_left(second, job_namespace.namespace, "cluster")
    first.terminate()
    start("cluster", "default")
    wait_for_claim(job_namespace, "support-bot", "team")
    assert control_plane.get("lease", "cluster", f"--namespace={OPERATOR_NAMESPACE}")["spec"]["holderIdentity"]


@promise(
    fault="two installations of the operator serve the same namespace",
    promise="each run has one operator, which does not change",
    how="two operators that start together, six runs",
)
def test_two_installations_that_start_together_share_no_run(job_namespace: JobNamespace, start: Start) -> None:
    operators = start("left"), start("right")
    for number in range(6):
        job_namespace.submit(f"run-{number}")
    wait_until(
        "all are claimed",
        lambda: all(job_namespace.status(f"run-{number}").get("operator") for number in range(6)),
        timeout=60,
    )
    claims = {name: job_namespace.status(name)["operator"] for name in (f"run-{number}" for number in range(6))}
    for number in range(6):
        name = f"run-{number}"
        job_namespace.end_pod(f"{name}-prepare", 1, "")
    wait_until("all go on", lambda: all(job_namespace.status(name).get("preparation") for name in claims), timeout=60)
    assert {name: job_namespace.status(name)["operator"] for name in claims} == claims
    assert all(operator.healthy() for operator in operators)
