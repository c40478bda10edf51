"""A run on a real control plane whose policies deny what the operator has to do."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests.chaos.promises import promise
from tests.cluster.cluster import Cluster
from tests.cluster.host.commands import CommandError, wait_until
from tests.integration.operator_process import (
    ACCOUNT,
    NAME,
    OPERATOR_NAMESPACE,
    PREPARE,
    TRAIN,
    JobNamespace,
    Operator,
)

POLICY: Final = "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicies"
BINDING: Final = "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicybindings"
OPERATOR: Final = f"system:serviceaccount:{OPERATOR_NAMESPACE}:{ACCOUNT}"
DENIAL: Final = "not before Monday"
PROBE: Final[dict[str, Any]] = {
    "apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "probe"},
    "spec": {"suspend": True, "template": {"spec": {
        "restartPolicy": "Never", "containers": [{"name": "probe", "image": "probe"}],
    }}},
}  # fmt: skip
"""A Job that shows whether a policy is in force yet."""
RETRY_PATIENCE: Final = 180.0
"""Seconds; a denied change is tried again after one minute."""


@pytest.fixture(autouse=True)
def operator(installed: Cluster, job_namespace: JobNamespace, tmp_path: Path) -> Iterator[Operator]:
    operator = Operator(installed, tmp_path, job_namespace.namespace).start()
    yield operator
    operator.stop_and_check_log()


class Policy:
    """Denies the operator one operation on the Jobs of a namespace; without a reason, so that it answers 422."""

    def __init__(self, namespace: JobNamespace, operation: str) -> None:
        self._namespace, self._operation = namespace, operation
        self._name = f"{namespace.namespace}-{operation.lower()}"

    def put_in_force(self) -> None:
        """Create the policy, and wait until the API server applies it."""
        where = f"request.namespace == '{self._namespace.namespace}' && request.userInfo.username == '{OPERATOR}'"
        rule = {"apiGroups": ["batch"], "apiVersions": ["v1"], "operations": [self._operation], "resources": ["jobs"]}
        group = {"apiVersion": "admissionregistration.k8s.io/v1", "metadata": {"name": self._name}}
        admin = self._namespace.cluster.admin
        admin.create(self._namespace.path("jobs"), PROBE)
        admin.create(POLICY, {**group, "kind": "ValidatingAdmissionPolicy", "spec": {
            "matchConstraints": {"resourceRules": [rule]},
            "matchConditions": [{"name": "operator", "expression": where}],
            "validations": [{"expression": "false", "message": DENIAL}],
        }})  # fmt: skip
        admin.create(BINDING, {**group, "kind": "ValidatingAdmissionPolicyBinding", "spec": {
            "policyName": self._name, "validationActions": ["Deny"],
        }})  # fmt: skip
        wait_until("policy in force", self._denies, timeout=60)

    def lift(self) -> None:
        """Delete the policy."""
        for path in (BINDING, POLICY):
            self._namespace.cluster.admin.delete(f"{path}/{self._name}")

    def _denies(self) -> bool:
        verb = {"CREATE": ["create", "job", "other", "--image=probe"], "DELETE": ["delete", "job", "probe"]}
        try:
            self._namespace.kubectl(*verb[self._operation], "--dry-run=server", f"--as={OPERATOR}")
        except CommandError as error:
            return DENIAL in str(error)
        return False


@promise(
    fault="a policy denies the operator the deletion of Jobs",
    promise="a run that is suspended holds no pod all the same, says what was denied, and resumes later",
    how="a ValidatingAdmissionPolicy, lifted after a while",
)
def test_suspended_run_whose_job_may_not_be_deleted_holds_no_pod(job_namespace: JobNamespace) -> None:
    job_namespace.run_to_training()
    policy = Policy(job_namespace, "DELETE")
    policy.put_in_force()
    job_namespace.kubectl("patch", "qlorajob", NAME, "--type=merge", '--patch={"spec": {"suspend": true}}')
    wait_until("end of the pods", lambda: not job_namespace.pods_of(TRAIN), timeout=RETRY_PATIENCE)
    denied = job_namespace.wait_for("Suspended")
    assert TRAIN in job_namespace.jobs()
    assert DENIAL in denied["message"]
    policy.lift()
    job_namespace.kubectl("patch", "qlorajob", NAME, "--type=merge", '--patch={"spec": {"suspend": false}}')
    second = TRAIN.removesuffix("1") + "2"
    job_namespace.start_pod(second)
    job_namespace.wait_for("Training")
    assert [attempt["number"] for attempt in job_namespace.status()["attempts"]] == [1, 2]


@promise(
    fault="a policy denies the operator the creation of Jobs, with the API server's status for invalid objects",
    promise="the run waits as PodRejected with the policy's sentence, and starts once it is lifted",
    how="a ValidatingAdmissionPolicy without a reason",
)
def test_run_whose_jobs_a_policy_denies_waits_and_starts_once_it_is_lifted(job_namespace: JobNamespace) -> None:
    policy = Policy(job_namespace, "CREATE")
    policy.put_in_force()
    job_namespace.submit()
    assert DENIAL in job_namespace.wait_for("Pending", "PodRejected")["message"]
    policy.lift()
    wait_until("preparation", lambda: PREPARE in job_namespace.jobs(), timeout=RETRY_PATIENCE)
    assert job_namespace.status()["phase"] in {"Pending", "Preparing"}
