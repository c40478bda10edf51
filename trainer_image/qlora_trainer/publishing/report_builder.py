"""Builds the report of a run and its summary, the result."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import torch

from qlora_api.report import EvaluatedRow, RunReport, Sample, ServingCheck, TaskScore, TextSpan
from qlora_api.result import Result
from qlora_api.runconfig import RunConfig
from qlora_trainer.evaluation import scoring
from qlora_trainer.model.hardware import peak_memory_bytes
from qlora_trainer.model.runtime_settings import RuntimeSettings
from qlora_trainer.observability.progress_tracker import time_and_tokens
from qlora_trainer.publishing.html_report import library_versions
from qlora_trainer.publishing.publish import REPORT, WEIGHTS_FOLDER
from qlora_trainer.training.state import History, selected_step


@dataclass(frozen=True)
class ReportInputs:
    """Everything that a report is built from."""

    history: History
    rows: tuple[EvaluatedRow, ...]
    tasks: tuple[TaskScore, ...]
    serving: ServingCheck
    preview: tuple[tuple[TextSpan, ...], ...]
    earlier_peak_bytes: int
    """Peak memory of earlier attempts: the last attempt may only have evaluated."""


def build_report(config: RunConfig, settings: RuntimeSettings, inputs: ReportInputs, started: datetime) -> RunReport:
    """Return the report of a run."""
    seconds, tokens = time_and_tokens(inputs.history.steps)
    return RunReport(
        job=config.job,
        namespace=config.namespace,
        run=config.uid,
        attempt=config.attempt,
        digest=config.prepared.digest,
        spec=config.spec,
        plan=config.plan,
        prepared=config.prepared,
        choices=settings.reasons,
        history=tuple(inputs.history.steps),
        held_out=tuple(inputs.history.validations),
        adapter_step=selected_step(inputs.history, config.spec.training),
        evaluation=scoring.summarize(inputs.rows),
        confidence=scoring.estimate_confidence(inputs.rows),
        samples=collect_samples(inputs.rows),
        preview=inputs.preview,
        tasks=inputs.tasks,
        serving=inputs.serving,
        started_at=started,
        finished_at=datetime.now(UTC),
        training_seconds=seconds,
        tokens_per_second=tokens / seconds,
        peak_memory_bytes=max(inputs.earlier_peak_bytes, peak_memory_bytes(torch.device(config.plan.device))),
        versions=library_versions(),
    )


def collect_samples(rows: Sequence[EvaluatedRow]) -> tuple[Sample, ...]:
    """Return prompts with the answers of base and adapter."""
    return tuple(
        Sample(prompt=row.prompt, reference=row.reference, base=row.base.answer or "", adapter=row.adapter.answer or "")
        for row in scoring.answered(rows)
    )


def build_result(config: RunConfig, report: RunReport) -> Result:
    """Return the summary of a run."""
    prefix, plan = config.prepared.prefix, config.plan
    gpus = plan.nodes * plan.gpus_per_node
    return Result(
        adapter=f"{prefix}/{WEIGHTS_FOLDER[config.spec.method]}",
        report=f"{prefix}/{REPORT}",
        evaluation=report.evaluation,
        steps=len(report.history),
        tokens_per_second=round(report.tokens_per_second, 1),
        gpu_seconds=round(report.training_seconds * gpus) if gpus else None,
    )
