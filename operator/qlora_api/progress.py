"""The body that a training pod posts: Kubeflow Trainer's status protocol."""

from datetime import datetime
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel


class _WireModel(BaseModel):
    """Tolerant of unknown fields: newer clients must not lose their progress."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="ignore", frozen=True)


class ReportedMetric(_WireModel):
    """A number or a name, as a string: the protocol's choice."""

    name: Annotated[str, Field(max_length=128)]
    value: Annotated[str, Field(max_length=2048)]


class TrainerStatus(_WireModel):
    """One report of a running pod.

    transformers' KubeflowCallback sends the metrics current_step, total_steps and loss;
    our trainer adds phase, tokens_per_second, and checkpoint_step, _uri, _time and _verified of its newest checkpoint.
    """

    progress_percentage: int | None = Field(default=None, ge=0, le=100)
    estimated_remaining_seconds: int | None = Field(default=None, ge=0)
    metrics: Annotated[tuple[ReportedMetric, ...], Field(max_length=64)] = ()
    last_updated_time: datetime


class ProgressReport(_WireModel):
    """The body of the POST."""

    trainer_status: TrainerStatus
