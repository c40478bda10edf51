"""The result of preparation: reported by the prepare pod, input of the training pod."""

from typing import Annotated

from pydantic import Field

from qlora_api.base import ApiModel
from qlora_api.object_names import ObjectName
from qlora_api.result import Result
from qlora_api.v1alpha1 import DataStatus, ModelStatus


class Prepared(ApiModel):
    """What preparation found, without a GPU; also stored in the output as prepared/prepared.json."""

    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    """First 16 hex digits of the SHA-256 over everything that decides the result; equal digests mean equal results."""
    prefix: str
    """<output.uri>/<job>/<digest>, the prefix of everything that belongs to this result."""
    model: ModelStatus
    dataset: DataStatus
    trainer_version: str
    published: Result | None = None
    """The result, if a complete manifest with this digest already exists."""


class PinnedTask(ApiModel):
    """One leaf task of a public benchmark, with its data pinned to a commit, so that every attempt uses the same."""

    name: str
    file: ObjectName
    """Path of its configuration in lm-evaluation-harness's tasks folder."""
    dataset: str
    """Dataset repository on the hub."""
    commit: str
    part: str | None = None
    """Configuration of the dataset, if it has several."""


class PinnedTasks(ApiModel):
    """prepared/tasks.json; not part of Prepared, because a hundred tasks would not fit into a termination message."""

    tasks: tuple[PinnedTask, ...] = ()
