"""What a run found out, as its report and as its result in short."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import torch

from qlora_api.report import EvaluatedRow, Piece, RunReport, Sample, ServingCheck, TaskScore
from qlora_api.result import Result
from qlora_api.runconfig import RunConfig
from qlora_trainer import scores
from qlora_trainer.choices import Choices
from qlora_trainer.hardware import peak_memory_bytes
from qlora_trainer.history import History, kept_step
from qlora_trainer.pace import time_and_tokens
from qlora_trainer.publish import REPORT, WEIGHTS
from qlora_trainer.report import library_versions


@dataclass(frozen=True)
class Outcome:
    """What a run found out."""

    history: History
    rows: tuple[EvaluatedRow, ...]
    tasks: tuple[TaskScore, ...]
    serving: ServingCheck
    preview: tuple[tuple[Piece, ...], ...]
    earlier_peak_bytes: int
    """Peak of the memory in earlier attempts: the last one may only have had to evaluate."""


def build_report(config: RunConfig, choices: Choices, outcome: Outcome, started: datetime) -> RunReport:
    """Return the report of a run."""
    seconds, tokens = time_and_tokens(outcome.history.steps)
    return RunReport(
        job=config.job,
        namespace=config.namespace,
        run=config.uid,
        attempt=config.attempt,
        digest=config.prepared.digest,
        spec=config.spec,
        plan=config.plan,
        prepared=config.prepared,
        choices=choices.reasons,
        history=tuple(outcome.history.steps),
        held_out=tuple(outcome.history.held_out),
        adapter_step=kept_step(outcome.history, config.spec.training),
        evaluation=scores.summarise(outcome.rows),
        confidence=scores.estimate_confidence(outcome.rows),
        samples=collect_samples(outcome.rows),
        preview=outcome.preview,
        tasks=outcome.tasks,
        serving=outcome.serving,
        started_at=started,
        finished_at=datetime.now(UTC),
        training_seconds=seconds,
        tokens_per_second=tokens / seconds,
        peak_memory_bytes=max(outcome.earlier_peak_bytes, peak_memory_bytes(torch.device(config.plan.device))),
        versions=library_versions(),
    )


def collect_samples(rows: Sequence[EvaluatedRow]) -> tuple[Sample, ...]:
    """Return the answers side by side."""
    return tuple(
        Sample(prompt=row.prompt, reference=row.reference, base=row.base.answer or "", adapter=row.adapter.answer or "")
        for row in scores.answered(rows)
    )


def build_result(config: RunConfig, report: RunReport) -> Result:
    """Return the run in short."""
    prefix = config.prepared.prefix
    return Result(
        adapter=f"{prefix}/{WEIGHTS[config.spec.method]}",
        report=f"{prefix}/{REPORT}",
        evaluation=report.evaluation,
        steps=len(report.history),
        tokens_per_second=round(report.tokens_per_second, 1),
    )
