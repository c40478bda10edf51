"""spec.tracking: the experiment trackers that a run reports to."""

from typing import Annotated

from pydantic import Field

from qlora_api.base import ApiModel
from qlora_api.v1alpha1.patterns import NO_LOOPBACK, NO_METADATA_SERVER, PRINTABLE, SERVER_URL
from qlora_api.v1alpha1.types import SecretRef

TrackerName = Annotated[str, Field(min_length=1, max_length=128), PRINTABLE]
TrackerUrl = Annotated[
    str, Field(pattern=r"^https?://.+$", max_length=1024), PRINTABLE, SERVER_URL, NO_METADATA_SERVER, NO_LOOPBACK.rule
]


class WandbSpec(ApiModel):
    """Weights & Biases."""

    project: TrackerName = Field(description="Project of the run.")
    entity: TrackerName | None = Field(default=None, description="User or team. Default: the key's own.")
    base_url: TrackerUrl | None = Field(
        default=None, description="URL of a self-hosted server. Default: the public one."
    )
    secret_ref: SecretRef | None = Field(
        default=None, description="Secret with WANDB_API_KEY. `qlora run` uses the environment."
    )


class MlflowSpec(ApiModel):
    """MLflow."""

    uri: TrackerUrl = Field(description="URL of the tracking server.")
    experiment: TrackerName = Field(description="Experiment of the run; created if it does not exist.")
    secret_ref: SecretRef | None = Field(
        default=None,
        description=(
            "Secret with MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD. `qlora run` "
            "uses the environment."
        ),
    )


class TrackingSpec(ApiModel):
    """Experiment trackers; one that does not answer never fails or delays a run."""

    tensorboard: bool = Field(
        default=True, description="Write a TensorBoard event file, and publish it in report/tensorboard/."
    )
    wandb: WandbSpec | None = Field(default=None, description="Report to Weights & Biases. Default: no.")
    mlflow: MlflowSpec | None = Field(default=None, description="Report to MLflow. Default: no.")
