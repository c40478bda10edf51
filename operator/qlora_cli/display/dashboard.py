"""Dashboard of a QLoRAJob: progress bar, loss, model, data and plan, attempts, comparison, output URIs."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Final

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from qlora_api.escapes import escape_line
from qlora_api.names import TERMINAL, Phase
from qlora_api.reasons import NOTHING_TO_DO, REASONS
from qlora_api.v1alpha1 import Attempt, Progress, QLoRAJobStatus, RunUsage
from qlora_api.v1alpha1.usage import PARTS
from qlora_cli.cluster.jobs import ClusterJob
from qlora_cli.display.formats import PHASE_STYLES, format_age, render_columns
from qlora_cli.display.progress import clock_time
from qlora_cli.display.result import comparison_table
from qlora_cli.display.sparkline import sparkline

BAR_CHARACTERS: Final = 40
FIND_OPERATOR_HINT: Final = (
    "check whether one is running: kubectl get pods --all-namespaces -l app.kubernetes.io/name=qlora-operator"
)
_RUNNING: Final = frozenset({Phase.TRAINING, Phase.EVALUATING, Phase.PUBLISHING})


@dataclass(frozen=True)
class LossHistory:
    """The losses reported while the dashboard was shown, one per reported step."""

    losses: tuple[float, ...] = ()
    step: int = -1

    def extend(self, job: ClusterJob) -> "LossHistory":
        """Return the history with the last report added, if it is new; a resumed run repeats steps."""
        report = job.status.last_report
        if report is None or report.loss is None or report.step is None or report.step == self.step:
            return self
        return replace(self, losses=(*self.losses, report.loss), step=report.step)


def render_dashboard(job: ClusterJob, history: LossHistory, now: datetime, *, details: bool) -> RenderableType:
    """Return the dashboard; without details only what changes during the run."""
    parts: list[RenderableType] = [_headline(job, now)]
    if job.phase in _RUNNING and job.status.last_report:
        parts += [_bar(job.status.last_report, now), *_losses(history)]
    parts.append(_facts(job))
    if details and job.status.attempts:
        parts.append(_attempts(job.status.attempts))
    if details and job.status.evaluation:
        parts.append(comparison_table(job.status.evaluation))
    return Group(*parts)


def _headline(job: ClusterJob, now: datetime) -> Text:
    status = job.status
    age = f"  {format_age(job.created_at, status.finished_at or now)}"
    attempt = f"  attempt {status.attempt}" if status.attempt else ""
    return Text.assemble(
        (job.ref.name, "bold"), f" in {job.ref.namespace}  ", (job.phase, f"bold {PHASE_STYLES.get(job.phase, '')}"),
        attempt, age,
    )  # fmt: skip


def _bar(report: Progress, now: datetime) -> RenderableType:
    row = Table.grid(padding=(0, 2))
    row.add_row(ProgressBar(completed=report.percent, width=BAR_CHARACTERS), *describe_progress(report, now))
    return row


def describe_progress(report: Progress, now: datetime) -> Iterator[str]:
    """Yield percentage, step, time left and throughput; the time left counts down between two reports."""
    yield f"{report.percent}%"
    if report.step is not None and report.total_steps:
        yield f"step {report.step}/{report.total_steps}"
    if report.remaining_seconds:
        elapsed = (now - report.updated_at).total_seconds()
        yield f"{clock_time(max(int(report.remaining_seconds - max(elapsed, 0)), 0))} left"
    if report.tokens_per_second is not None:
        yield f"{report.tokens_per_second:.0f} tok/s"


def _losses(history: LossHistory) -> list[RenderableType]:
    if not history.losses:
        return []
    line = sparkline(history.losses, BAR_CHARACTERS)
    return [Text.assemble((line, "cyan"), f"  loss {history.losses[-1]:.3f}")]


def _facts(job: ClusterJob) -> Group:
    facts = list(_describe(job))
    width = max(len(name) for name, _ in facts)
    return Group(*(Text.assemble((f"{name:<{width}}", "bold"), f"  {escape_line(fact)}") for name, fact in facts))


def _describe(job: ClusterJob) -> Iterator[tuple[str, str]]:
    status = job.status
    yield from _reason(status)
    if status.model:
        yield "model", f"{status.model.uri} at {status.model.commit[:12]}, {status.model.parameters:,} weights"
    if status.dataset:
        data = status.dataset
        yield "data", f"{data.training_rows:,} training rows, {data.evaluation_rows:,} held-out rows, {data.format}"
    if status.plan:
        yield "plan", _describe_plan(status)
    if status.usage and status.usage.held:
        yield "usage", _describe_usage(status.usage)
    if status.checkpoint:
        yield "checkpoint", f"step {status.checkpoint.step}, {status.checkpoint.uri}"
    if status.output and status.output.adapter:
        yield from _output_uris(status.output.adapter, status.output.merged, status.output.report)


def _reason(status: QLoRAJobStatus) -> Iterator[tuple[str, str]]:
    if status.reason is None:
        yield "not reconciled", f"no operator has reconciled it yet; if this lasts, {FIND_OPERATOR_HINT}"
        return
    record = REASONS[status.reason]
    yield status.reason, status.message or record.sentence
    if status.phase not in TERMINAL and record.remedy != NOTHING_TO_DO:
        yield "fix", record.remedy


def _describe_plan(status: QLoRAJobStatus) -> str:
    plan = status.plan
    if plan is None:
        return ""
    devices = f"{plan.nodes} x {plan.gpus_per_node} GPUs" if plan.gpus_per_node else f"{plan.nodes} x CPU"
    batch = f"micro-batch {plan.micro_batch_size} x {plan.gradient_accumulation}"
    return f"{devices}, {plan.strategy}, {batch}, {plan.total_steps} steps"


def _describe_usage(usage: RunUsage) -> str:
    parts = ((part, getattr(usage, part)) for part in PARTS)
    shares = ", ".join(f"{part} {100 * seconds / usage.held:.0f}%" for part, seconds in parts if seconds)
    return f"{usage.gpu_hours} GPU-hours: {shares}"


def _output_uris(adapter: str, merged: str | None, report: str | None) -> Iterator[tuple[str, str]]:
    yield "adapter", adapter
    if merged:
        yield "merged", merged
    if report:
        yield "report", report.removesuffix(".json") + ".html"


def _attempts(attempts: tuple[Attempt, ...]) -> Group:
    return render_columns(("ATTEMPT", "ENDED WITH", "NODE", "TOOK", "MESSAGE"), map(_row, attempts))


def _row(attempt: Attempt) -> tuple[str, ...]:
    duration = format_age(attempt.started_at, attempt.finished_at) if attempt.started_at and attempt.finished_at else ""
    return str(attempt.number), attempt.reason or "", attempt.node, duration, attempt.message
