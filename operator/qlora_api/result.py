"""A published run in short: what the training pod reports last, and what a later prepare finds."""

from qlora_api.base import ApiModel
from qlora_api.v1alpha1 import EvaluationStatus


class Result(ApiModel):
    """A published run in short; it fits into a termination message."""

    adapter: str
    """URI of the adapter's folder."""
    report: str
    """URI of report.json."""
    merged: str | None = None
    """URI of the merged model, where one was asked for."""
    evaluation: EvaluationStatus
    steps: int
    tokens_per_second: float
