"""What a run found out, as its report and as its result in short."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import torch

from qlora_api.report import EvaluatedRow, Piece, RunReport, Sample, ServingCheck, TaskScore
from qlora_api.result import Result
from qlora_api.runconfig import RunConfig
from qlora_trainer.evaluation import scoring
from qlora_trainer.model.hardware import peak_memory_bytes
from qlora_trainer.model.runtime_settings import Choices
from qlora_trainer.observability.progress_tracker import time_and_tokens
from qlora_trainer.publishing.html_report import library_versions
from qlora_trainer.publishing.publish import REPORT, WEIGHTS
from qlora_trainer.training.state import History, kept_step


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
        evaluation=scoring.summarise(outcome.rows),
        confidence=scoring.estimate_confidence(outcome.rows),
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
        for row in scoring.answered(rows)
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
