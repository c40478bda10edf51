"""Summary of a published run: reported by the training pod at its end, found by a later preparation."""

from qlora_api.base import ApiModel
from qlora_api.v1alpha1 import EvaluationStatus


class Result(ApiModel):
    """Summary of a published run; it fits into a termination message."""

    adapter: str
    """URI of the adapter's folder."""
    report: str
    """URI of report.json."""
    merged: str | None = None
    """URI of the merged model, if spec.output.merged requests one."""
    evaluation: EvaluationStatus
    steps: int
    tokens_per_second: float
