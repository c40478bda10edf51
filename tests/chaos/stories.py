"""Whole lives of a QLoRAJob, played step by step: every step waits until the operator has told of the one before."""

from collections.abc import Callable
from typing import Final

from qlora_api import names
from qlora_api.reasons import Reason
from tests.integration.operator_process import NAME, PREPARE, TRAIN, JobNamespace
from tests.make import PREPARED_MESSAGE, PUBLISHED_MESSAGE, make_termination_message

SECOND: Final = names.train_job_name(NAME, 2)
SIGTERM_EXIT: Final = 143
Scenario = Callable[[JobNamespace], None]


def prepare(place: JobNamespace) -> None:
    """From the manifest to a training Job."""
    place.wait_for("Preparing")
    place.end_pod(PREPARE, 0, PREPARED_MESSAGE)


def train(place: JobNamespace, job: str = TRAIN, pods: int = 1) -> None:
    """A Job's pods start."""
    for index in range(pods):
        place.start_pod(job, index)
    place.wait_for("Training")


def published(place: JobNamespace) -> None:
    """All goes well."""
    place.submit()
    prepare(place)
    train(place)
    place.end_pod(TRAIN, 0, PUBLISHED_MESSAGE)
    place.wait_for("Succeeded", "Published")


def refused(place: JobNamespace) -> None:
    """The dataset is broken."""
    place.submit()
    place.wait_for("Preparing")
    place.end_pod(PREPARE, 3, make_termination_message(Reason.DATASET_INVALID, "row 7: field output is missing"))
    place.wait_for("Failed", "DatasetInvalid")


def interrupted(place: JobNamespace) -> None:
    """A drain takes the first attempt, and the second one publishes."""
    place.submit()
    prepare(place)
    train(place)
    place.end_pod(TRAIN, SIGTERM_EXIT, make_termination_message(Reason.INTERRUPTED, "stopped at step 7"))
    train(place, SECOND)
    place.end_pod(SECOND, 0, PUBLISHED_MESSAGE)
    place.wait_for("Succeeded", "Published")


def two_nodes(place: JobNamespace) -> None:
    """Two pods train together."""
    place.submit(resources={"nodes": 2})
    prepare(place)
    train(place, pods=2)
    place.end_pod(TRAIN, 0, "", index=1)
    place.end_pod(TRAIN, 0, PUBLISHED_MESSAGE, index=0)
    place.wait_for("Succeeded", "Published")


SCENARIOS: Final[dict[str, Scenario]] = {
    "published": published, "refused": refused, "interrupted": interrupted, "two-nodes": two_nodes,
}  # fmt: skip
