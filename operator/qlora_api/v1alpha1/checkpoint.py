"""spec.checkpoint: how much training an interruption may cost."""

from pydantic import Field

from qlora_api.base import ApiModel
from qlora_api.v1alpha1.types import Duration


class CheckpointSpec(ApiModel):
    """When the training state is saved to the output, so that a stopped run resumes from there."""

    every: Duration = Field(
        default="10m",
        description="Longest training time between two checkpoints; one is also written when the pod is asked to stop.",
    )
    steps: int | None = Field(
        default=None, ge=1, le=10_000_000, description="Write one every this many optimizer steps, instead of every."
    )
    keep: int = Field(
        default=2,
        ge=1,
        le=100,
        description="How many of the newest checkpoints to keep; all are deleted once published.",
    )
