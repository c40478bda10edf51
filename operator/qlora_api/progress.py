"""Body of the progress reports that a training pod posts: Kubeflow Trainer's status protocol."""

from datetime import datetime
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

MAX_COUNT: Final = 10**15 - 1
"""Largest number of steps or seconds: a float holds it exactly (to 2**53), and two of them fit the STEP column."""


class _WireModel(BaseModel):
    """Ignores unknown fields, so that reports of newer clients are accepted."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="ignore", frozen=True)


class ReportedMetric(_WireModel):
    """A metric; the protocol sends numbers as strings."""

    name: Annotated[str, Field(max_length=128)]
    value: Annotated[str, Field(max_length=2048)]


class TrainerStatus(_WireModel):
    """One report of a running pod.

    transformers' KubeflowCallback sends the metrics current_step, total_steps and loss; our trainer adds phase,
    tokens_per_second; checkpoint_step, checkpoint_uri, checkpoint_time, checkpoint_verified and checkpoint_digest of
    its newest checkpoint; and manifest_uri and manifest_digest of the result that it is about to publish.
    """

    progress_percentage: int | None = Field(default=None, ge=0, le=100)
    estimated_remaining_seconds: int | None = Field(default=None, ge=0, le=MAX_COUNT)
    metrics: Annotated[tuple[ReportedMetric, ...], Field(max_length=64)] = ()
    last_updated_time: datetime


class ProgressReport(_WireModel):
    """The body of the POST."""

    trainer_status: TrainerStatus
