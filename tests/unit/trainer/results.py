"""A result and the configuration of the run that publishes it, without training."""

from typing import Final

from qlora_api.prepared import Prepared
from qlora_api.result import Result
from qlora_api.runconfig import RunConfig
from qlora_api.v1alpha1 import DataStatus, EvaluationStatus, Metrics, ModelStatus
from tests.unit.trainer.tiny import make_spec, run_config

DIGEST: Final = "0123456789abcdef"


def result(loss: float) -> Result:
    """A result that tests identify by its loss."""
    metrics = Metrics(loss=loss, perplexity=1.0, token_accuracy=0.5)
    evaluation = EvaluationStatus(base=metrics, adapter=metrics, rows=1, tokens=1)
    return Result(adapter="a/adapter", report="r", evaluation=evaluation, steps=1, tokens_per_second=1.0)


def config(root: str) -> RunConfig:
    """A run that publishes below the root."""
    prepared = Prepared(
        digest=DIGEST,
        prefix=f"{root}/{DIGEST}",
        model=ModelStatus(uri="hf://o/m", commit="c" * 40, architecture="A", parameters=1),
        dataset=DataStatus(
            digest="d",
            format="instruction",
            training_rows=1,
            evaluation_rows=1,
            training_tokens=1,
            truncated_rows=0,
            longest_row_tokens=1,
        ),
        trainer_version="1",
    )
    return run_config(make_spec("hf://o/m", "s3://data/rows.jsonl", root), prepared)
