"""What the prepare pod tells the operator, and what the training pod starts from."""

from typing import Annotated

from pydantic import Field

from qlora_api.base import ApiModel
from qlora_api.result import Result
from qlora_api.v1alpha1 import DataStatus, ModelStatus


class Prepared(ApiModel):
    """Facts that were checked without a GPU; a copy lies in S3 as prepared/prepared.json."""

    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    """First 16 hex digits of the SHA-256 over all that decides the result: two runs with one digest are one run."""
    prefix: str
    """<output.uri>/<job>/<digest>: everything of this result lies below it."""
    model: ModelStatus
    dataset: DataStatus
    trainer_version: str
    published: Result | None = None
    """The result, if a complete manifest of this digest exists already."""


class PinnedTask(ApiModel):
    """One leaf task of a public benchmark, and the state of its data that every attempt uses."""

    name: str
    file: str
    """Its configuration, in the harness's folder of tasks."""
    dataset: str
    """Repository of its data on the hub."""
    commit: str
    part: str | None = None
    """Configuration of the dataset, where it has several."""


class PinnedTasks(ApiModel):
    """prepared/tasks.json: beside the facts and not among them, since a pod's last word has no room for a hundred."""

    tasks: tuple[PinnedTask, ...] = ()
