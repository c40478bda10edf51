"""The QLoRAJob resource: the only source of the CRD, its defaults, its bounds and its reference."""

from qlora_api.v1alpha1.checkpoint import CheckpointSpec
from qlora_api.v1alpha1.places import DatasetSpec, DataSource, EvaluationSplit, ModelSpec, OutputSpec, RowTemplate
from qlora_api.v1alpha1.recipe import (
    EarlyStoppingSpec,
    EvaluationSpec,
    GateSpec,
    LoraSpec,
    QuantizationSpec,
    TrainingSpec,
)
from qlora_api.v1alpha1.spec import (
    MUTABLE_FIELDS,
    DeadlinesSpec,
    QLoRAJobSpec,
    QueueSpec,
    ResourcesSpec,
    RetriesSpec,
    Toleration,
)
from qlora_api.v1alpha1.status import (
    Attempt,
    Checkpoint,
    Condition,
    DataStatus,
    EvaluationStatus,
    Metrics,
    ModelStatus,
    OutputStatus,
    Plan,
    Progress,
    QLoRAJobStatus,
    RowLengths,
)
from qlora_api.v1alpha1.tracking import MlflowSpec, TrackingSpec, WandbSpec
from qlora_api.v1alpha1.types import (
    MergeBase,
    SecretRef,
    to_timedelta,
)

__all__ = [
    "MUTABLE_FIELDS",
    "Attempt",
    "Checkpoint",
    "CheckpointSpec",
    "Condition",
    "DataSource",
    "DataStatus",
    "DatasetSpec",
    "DeadlinesSpec",
    "EarlyStoppingSpec",
    "EvaluationSpec",
    "EvaluationSplit",
    "EvaluationStatus",
    "GateSpec",
    "LoraSpec",
    "MergeBase",
    "Metrics",
    "MlflowSpec",
    "ModelSpec",
    "ModelStatus",
    "OutputSpec",
    "OutputStatus",
    "Plan",
    "Progress",
    "QLoRAJobSpec",
    "QLoRAJobStatus",
    "QuantizationSpec",
    "QueueSpec",
    "ResourcesSpec",
    "RetriesSpec",
    "RowLengths",
    "RowTemplate",
    "SecretRef",
    "Toleration",
    "TrackingSpec",
    "TrainingSpec",
    "WandbSpec",
    "to_timedelta",
]
