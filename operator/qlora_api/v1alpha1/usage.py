"""GPU time of a run, as its status records it: a pod holds its GPUs from its binding to a node until its end.

Every second of every pod belongs to one of the parts; their sum is what was held.
"""

from collections.abc import Iterable
from datetime import datetime
from typing import Annotated, Final

from pydantic import Field

from qlora_api.base import MAX_INTEGER, ApiModel
from qlora_api.gpu_prices import Currency, Price
from qlora_api.progress import MAX_COUNT

MAX_HOLDING: Final = 128
"""Most pods of an attempt that hold GPUs: 64 nodes, and as many of an earlier start that are being stopped."""
PARTS: Final = ("starting", "training", "evaluating", "publishing", "repeated", "idle")
"""What GPUs are held for; each has a field of GpuUsage."""
_Seconds = Annotated[int, Field(ge=0, le=MAX_INTEGER)]


class GpuUsage(ApiModel):
    """GPU-seconds that pods held, and for what; the parts add up to what was held."""

    since: datetime | None = Field(default=None, description="When the first of the pods was bound to its node.")
    until: datetime | None = Field(
        default=None, description="Up to when it is accounted; what pods hold now is added when they report or end."
    )
    pod_seconds: _Seconds = Field(
        default=0, description="Seconds for which pods held their nodes, with or without GPUs."
    )
    held: _Seconds = Field(default=0, description="GPU-seconds held: the GPUs of each pod times its seconds.")
    starting: _Seconds = Field(
        default=0, description="Before the first step: image, containers, model and data are loaded."
    )
    training: _Seconds = Field(default=0, description="Training, checkpoints included.")
    evaluating: _Seconds = Field(default=0, description="Evaluating base model and adapter.")
    publishing: _Seconds = Field(default=0, description="Verifying and uploading the result.")
    repeated: _Seconds = Field(
        default=0, description="Training steps again that an earlier attempt had done after its last checkpoint."
    )
    idle: _Seconds = Field(
        default=0,
        description=(
            "Held for nothing: waiting for the other pods of the run, hung, on a node that does not respond, or after "
            "the trainer has ended."
        ),
    )


class HeldPod(ApiModel):
    """A pod that holds its GPUs."""

    uid: Annotated[str, Field(max_length=64)] = Field(description="Its metadata.uid.")
    until: datetime = Field(description="Up to when its time is accounted.")


class AttemptUsage(GpuUsage):
    """GPU-seconds of an attempt, and the pods that add to them."""

    gpus_per_pod: int = Field(ge=0, description="GPUs of each of its pods.")
    gpu_product: Annotated[str, Field(max_length=63)] | None = Field(
        default=None, description="Product of these GPUs, as the plan names it; absent: any."
    )
    price: Price | None = Field(
        default=None, description="Price of a GPU-hour when it started; absent: the installation has none."
    )
    currency: Currency | None = Field(default=None, description="Currency of the price (ISO 4217).")
    holding: Annotated[tuple[HeldPod, ...], Field(max_length=MAX_HOLDING)] = Field(
        default=(), description="Pods that hold their GPUs now."
    )


class RunUsage(GpuUsage):
    """GPU-seconds of all attempts."""

    gpu_hours: Annotated[str, Field(max_length=16)] | None = Field(
        default=None, description="What was held, in hours, for the GPU-HOURS column."
    )
    highest_step: int = Field(
        default=0,
        ge=0,
        le=MAX_COUNT,
        description="The highest step that an attempt reported; up to it, steps are repeated.",
    )
    saved: _Seconds = Field(
        default=0, description="GPU-seconds that an earlier run trained for the result that this one found published."
    )


def sum_usage(usages: Iterable[GpuUsage]) -> GpuUsage:
    """Return the usage of several attempts together."""
    every = tuple(usages)
    numbers = {name: sum(getattr(usage, name) for usage in every) for name in ("pod_seconds", "held", *PARTS)}
    since = min((usage.since for usage in every if usage.since), default=None)
    until = max((usage.until for usage in every if usage.until), default=None)
    return GpuUsage(since=since, until=until, **numbers)
