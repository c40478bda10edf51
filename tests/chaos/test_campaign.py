"""Any manifest is rejected, or its run ends or waits in a documented state.

The method is that of Acto (Gu et al., SOSP 2023): manifests are generated from the schema, and checked against
invariants instead of expectations of their own.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from qlora_api import names
from qlora_api.names import Role
from tests.chaos.mutations import Mutation, random_mutations, systematic
from tests.chaos.promises import Dose, promise
from tests.cluster.admin import Admin
from tests.cluster.cluster import Cluster
from tests.cluster.host.commands import wait_until
from tests.integration.operator_process import JobNamespace, Operator, open_job_namespace, wire_now
from tests.make import PREPARED_MESSAGE, PUBLISHED_MESSAGE, message_for

REFUSALS: Final = frozenset({400, 413, 422})
WAITING: Final = frozenset({"Suspended", "Queued"})
"""Phases that only a person or a queue controller ends."""
REFUSED: Final = "PodRejected"
"""Reason of a run whose pod waits for what the API server's refusal names, such as a service account."""
JOBS: Final = f"/apis/{names.GROUP}/{names.VERSION}/namespaces/{{namespace}}/{names.PLURAL}"


class Campaign:
    """Applies manifests, simulates their pods, and observes the outcome."""

    def __init__(self, admin: Admin, namespace: str) -> None:
        self.admin = admin
        self.path = JOBS.format(namespace=namespace)
        self.pods = f"/api/v1/namespaces/{namespace}/pods"
        self.namespace = namespace
        self.accepted: dict[str, Mutation] = {}
        self.refusals: list[str] = []
        self._ended: set[str] = set()

    def submit(self, number: int, mutation: Mutation) -> None:
        """Apply one manifest; the API server may reject it, but must not fail."""
        name = f"m-{number}"
        code, answer = self.admin.request("POST", self.path, mutation.manifest(name, self.namespace))
        if code == 201:
            self.accepted[name] = mutation
        else:
            assert code in REFUSALS, (mutation, code, answer)
            self.refusals.append(f"{mutation.what}: {answer['message']}")

    def settled(self) -> bool:
        """End all pods, and return whether every run has ended or waits for a person or a queue."""
        for pod in self.admin.items(self.pods):
            if pod["metadata"]["name"] not in self._ended:
                self._end(pod)
        return all(is_settled(job) for job in self.jobs())

    def _end(self, pod: dict[str, Any]) -> None:
        name, labels = pod["metadata"]["name"], pod["metadata"]["labels"]
        job, role = labels.get(names.JOB_LABEL, ""), labels.get(names.ROLE_LABEL)
        message = PREPARED_MESSAGE if role == Role.PREPARE else PUBLISHED_MESSAGE
        message = message_for(job, message, self.accepted[job].spec if job in self.accepted else None)
        ended = {
            "exitCode": 0,
            "message": message,
            "reason": "Completed",
            "startedAt": wire_now(),
            "finishedAt": wire_now(),
        }
        container = {
            "name": names.CONTAINER, "state": {"terminated": ended}, "image": "trainer:test", "imageID": "",
            "ready": False, "restartCount": 0,
        }  # fmt: skip
        self.admin.patch_status(f"{self.pods}/{name}", {"phase": "Succeeded", "containerStatuses": [container]})
        self._ended.add(name)

    def jobs(self) -> list[dict[str, Any]]:
        """Return every QLoRAJob."""
        return self.admin.items(self.path)


def conditions_of(job: dict[str, Any]) -> dict[str, str]:
    """Return the conditions by type."""
    return {entry["type"]: entry["status"] for entry in job["status"].get("conditions", ())}


def is_settled(job: dict[str, Any]) -> bool:
    """Return whether the run has ended or waits, and the status is that of its latest generation."""
    holds, status = conditions_of(job), job["status"]
    ended = "True" in {holds.get("Ready"), holds.get("Stalled")}
    waits = (status.get("phase") in WAITING or status.get("reason") == REFUSED) and holds.get("Ready") == "False"
    return bool(status["observedGeneration"] == job["metadata"]["generation"]) and (ended or waits)


@pytest.fixture
def job_namespace(installed: Cluster, request: pytest.FixtureRequest) -> Iterator[JobNamespace]:
    with open_job_namespace(installed, request.node.name) as job_namespace:
        yield job_namespace


@pytest.fixture
def campaign(installed: Cluster, job_namespace: JobNamespace, tmp_path: Path) -> Iterator[Campaign]:
    """An operator for one namespace, whose log must have no traceback."""
    operator = Operator(installed, tmp_path, job_namespace.namespace).start()
    yield Campaign(installed.admin, job_namespace.namespace)
    operator.stop_and_check_log()


@promise(
    fault="Manifests with arbitrary values in any field",
    promise="Each is rejected by the API server, or its run ends Ready or Stalled, or waits for a person or a queue, "
    "with status.observedGeneration up to date; the operator's log has no traceback.",
    how="Every bound and type in the CRD's schema, and combinations generated by Hypothesis; pods report success.",
)
@pytest.mark.timeout(1800)
def test_random_manifest_ends_with_a_reason(campaign: Campaign, dose: Dose, outcome: Callable[[str], None]) -> None:
    edges = list(systematic())
    chosen = edges[:: max(len(edges) // dose(short=30, full=800), 1)]
    mutations = [*chosen, *random_mutations(dose(short=20, full=400))]
    for number, mutation in enumerate(mutations):
        campaign.submit(number, mutation)
    try:
        wait_until("settled runs", campaign.settled, timeout=dose(short=120, full=600), interval=1)
    finally:
        unsettled = {
            campaign.accepted[name].what: job["status"]
            for job in campaign.jobs()
            if not is_settled(job) and (name := job["metadata"]["name"])
        }
        print(unsettled)
    phases = Counter(job["status"]["phase"] for job in campaign.jobs())
    counts = ", ".join(f"{count} {phase}" for phase, count in sorted(phases.items()))
    print("refused:", *campaign.refusals, sep="\n  ")
    outcome(f"{len(mutations)} manifests: {len(campaign.refusals)} rejected, {counts}")
    assert sum(phases.values()) == len(campaign.accepted) > 0
