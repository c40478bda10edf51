"""Valid values for the command line's tests, with one thing changed."""

import textwrap
from datetime import UTC, datetime

from qlora_api.names import Phase
from qlora_api.prepared import Prepared
from qlora_api.result import Result
from qlora_api.v1alpha1 import DataStatus, EvaluationStatus, Metrics, ModelStatus, Progress

JOB = textwrap.dedent("""\
    apiVersion: qlora.dev/v1alpha1
    kind: QLoRAJob
    metadata:
      name: support-bot
    spec:
      model:
        uri: hf://organization/name
      dataset:
        uri: s3://data/train.jsonl
      lora:
        rank: 16
        targets: [q_proj, v_proj]
      resources:
        gpusPerNode: 0
      output:
        uri: s3://adapters/team-a
    """)

PROGRESS_BARS = ("Loading weights", "Writing model shards")
"""Transformers' progress bars; `qlora` turns them off before their import, which in a test came earlier."""

EVALUATION = EvaluationStatus(
    base=Metrics(loss=4.0, perplexity=54.6, token_accuracy=0.25),
    adapter=Metrics(loss=3.0, perplexity=20.1, token_accuracy=0.40),
    rows=112,
    tokens=1400,
)
RESULT = Result(
    adapter="file:///out/support-bot/0123456789abcdef/adapter",
    report="file:///out/support-bot/0123456789abcdef/report/report.json",
    evaluation=EVALUATION,
    steps=3,
    tokens_per_second=225.0,
)


def make_prepared(published: Result | None = None) -> Prepared:
    return Prepared(
        digest="0123456789abcdef",
        prefix="file:///out/support-bot/0123456789abcdef",
        model=ModelStatus(uri="hf://organization/name", commit="c" * 40, architecture="LlamaForCausalLM", parameters=9),
        dataset=DataStatus(
            digest="d" * 64,
            format="instruction",
            training_rows=24,
            evaluation_rows=112,
            training_tokens=900,
            truncated_rows=0,
            longest_row_tokens=80,
        ),
        trainer_version="0.1.0",
        published=published,
    )


def make_progress(step: int, phase: Phase = Phase.TRAINING) -> Progress:
    return Progress(
        percent=step * 100 // 3,
        step=step,
        total_steps=3,
        remaining_seconds=(3 - step) * 65,
        loss=4.0 - step / 4,
        tokens_per_second=225.4,
        phase=phase,
        updated_at=datetime(2026, 1, 31, tzinfo=UTC),
    )


def command_lines(stderr: str) -> list[str]:
    """What a command itself says while it works."""
    return [line for line in stderr.splitlines() if line and not line.startswith(PROGRESS_BARS)]
