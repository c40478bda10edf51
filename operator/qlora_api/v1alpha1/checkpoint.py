"""How much of a run a stop may cost."""

from pydantic import Field

from qlora_api.base import ApiModel
from qlora_api.v1alpha1.types import Duration


class CheckpointSpec(ApiModel):
    """When the state of the training is kept in the output, so that a stopped run goes on from there."""

    every: Duration = Field(
        default="10m",
        description="Longest time of training between two checkpoints; one is also written when the pod must stop.",
    )
    steps: int | None = Field(
        default=None, ge=1, le=10_000_000, description="Write one each time this many steps are done, instead of every."
    )
    keep: int = Field(
        default=2, ge=1, le=100, description="Newest checkpoints that are kept; all go once the adapter is published."
    )
