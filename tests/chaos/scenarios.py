"""Scenarios of a QLoRAJob from start to end; every step waits until the status shows the previous one."""

from collections.abc import Callable
from typing import Final

from qlora_api import names
from qlora_api.reasons import Reason
from tests.cluster.host.commands import wait_until
from tests.integration.operator_process import NAME, PREPARE, TRAIN, JobNamespace
from tests.make import PREPARED_MESSAGE, PUBLISHED_MESSAGE, make_termination_message

PREPARE_AGAIN: Final = names.prepare_job_name(NAME, 2)
SECOND: Final = names.train_job_name(NAME, 2)
SIGTERM_EXIT: Final = 143
Scenario = Callable[[JobNamespace], None]


def prepare(job_namespace: JobNamespace) -> None:
    """Finish prepare successfully."""
    job_namespace.wait_for("Preparing")
    job_namespace.end_pod(PREPARE, 0, PREPARED_MESSAGE)


def train(job_namespace: JobNamespace, job: str = TRAIN, pods: int = 1) -> None:
    """Start the pods of a Job."""
    for index in range(pods):
        job_namespace.start_pod(job, index)
    job_namespace.wait_for("Training")


def published(job_namespace: JobNamespace) -> None:
    """The run publishes."""
    job_namespace.submit()
    prepare(job_namespace)
    train(job_namespace)
    job_namespace.end_pod(TRAIN, 0, PUBLISHED_MESSAGE)
    job_namespace.wait_for("Succeeded", "Published")


def refused(job_namespace: JobNamespace) -> None:
    """The dataset is invalid."""
    job_namespace.submit()
    job_namespace.wait_for("Preparing")
    job_namespace.end_pod(
        PREPARE, 3, make_termination_message(Reason.DATASET_INVALID, "row 7: field output is missing")
    )
    job_namespace.wait_for("Failed", "DatasetInvalid")


def late_secret(job_namespace: JobNamespace) -> None:
    """A Secret appears after the first preparation."""
    job_namespace.submit(deadlines={"startup": "10s"})
    job_namespace.wait_for("Preparing")
    job_namespace.end_pod(PREPARE, 3, make_termination_message(Reason.SECRET_NOT_FOUND, "spec.output.secretRef: no"))
    job_namespace.wait_for("Preparing", "SecretNotFound")
    job_namespace.end_pod(PREPARE_AGAIN, 0, PREPARED_MESSAGE)
    train(job_namespace)
    job_namespace.end_pod(TRAIN, 0, PUBLISHED_MESSAGE)
    job_namespace.wait_for("Succeeded", "Published")
    wait_until("the first prepare Job is gone", lambda: PREPARE not in job_namespace.jobs())


def interrupted(job_namespace: JobNamespace) -> None:
    """A drain ends the first attempt, and the second one publishes."""
    job_namespace.submit()
    prepare(job_namespace)
    train(job_namespace)
    job_namespace.end_pod(TRAIN, SIGTERM_EXIT, make_termination_message(Reason.INTERRUPTED, "stopped at step 7"))
    train(job_namespace, SECOND)
    job_namespace.end_pod(SECOND, 0, PUBLISHED_MESSAGE)
    job_namespace.wait_for("Succeeded", "Published")


def two_nodes(job_namespace: JobNamespace) -> None:
    """Two pods train together."""
    job_namespace.submit(resources={"nodes": 2})
    prepare(job_namespace)
    train(job_namespace, pods=2)
    job_namespace.end_pod(TRAIN, 0, "", index=1)
    job_namespace.end_pod(TRAIN, 0, PUBLISHED_MESSAGE, index=0)
    job_namespace.wait_for("Succeeded", "Published")


SCENARIOS: Final[dict[str, Scenario]] = {
    "published": published, "refused": refused, "late-secret": late_secret, "interrupted": interrupted,
    "two-nodes": two_nodes,
}  # fmt: skip
