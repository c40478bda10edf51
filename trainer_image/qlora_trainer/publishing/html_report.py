"""The report as a page: one file that opens offline, on any screen."""

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Final, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from qlora_api import __version__
from qlora_api.report import Interval, RunReport
from qlora_api.units import format_gib
from qlora_trainer.publishing.plots import Plot
from qlora_trainer.publishing.report_sections import make_footprint, make_lineage, make_recipe

_OPEN_SAMPLES: Final = 4
"""Prompts whose answers are seen at once; the others unfold."""
_LIBRARIES: Final = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")


def library_versions() -> dict[str, str]:
    """Return the releases that decide what a run computes."""
    return {"qlora-operator": __version__} | {name: version(name) for name in _LIBRARIES}


@dataclass(frozen=True)
class Tile:
    """A figure that is seen first."""

    label: str
    value: str
    tone: str = ""


@dataclass(frozen=True)
class MetricCell:
    """A figure and the range that it would probably stay in."""

    value: str
    interval: str

    def __str__(self) -> str:
        return f"{self.value} {self.interval}"


@dataclass(frozen=True)
class MetricComparison:
    """One metric of base and adapter."""

    label: str
    base: MetricCell
    adapter: MetricCell
    change: MetricCell
    tone: str


@dataclass(frozen=True)
class Table:
    """Names and values."""

    title: str
    rows: tuple[tuple[str, str], ...]


def render_html(report: RunReport, charts: Iterable[Plot] = ()) -> str:
    """Return the page; whatever comes from the dataset is escaped."""
    environment = Environment(
        loader=PackageLoader("qlora_trainer"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("report.html.j2").render(
        report=report,
        charts=tuple(charts),
        tiles=make_tiles(report),
        comparison=make_comparison(report),
        plan=make_plan_rows(report),
        open_samples=_OPEN_SAMPLES,
        footprint=make_footprint(report.plan, report.spec.resources.memory, report.peak_memory_bytes),
        tables=make_tables(report),
    )


def make_tiles(report: RunReport) -> tuple[Tile, ...]:
    """Return the figures at the top."""
    base, adapter, predicted = report.evaluation.base, report.evaluation.adapter, report.plan.peak_bytes
    expected = f", {format_gib(predicted, 2)} predicted" if predicted is not None else ""
    return (
        Tile("held-out loss", f"{base.loss:.3f} → {adapter.loss:.3f}", _tone(adapter.loss - base.loss)),
        Tile("optimizer steps", f"{len(report.history)}"),
        Tile("training time", format_duration(report.training_seconds)),
        Tile("tokens per second", f"{report.tokens_per_second:,.0f}"),
        Tile(f"peak memory{expected}", format_gib(report.peak_memory_bytes, 2)),
    )


class ReportMetric(NamedTuple):
    """One figure of an evaluation, and how it is shown."""

    field: str
    label: str
    number_format: str
    less_is_better: bool


REPORT_METRICS: Final = (
    ReportMetric("loss", "loss, nats per token", ".3f", less_is_better=True),
    ReportMetric("perplexity", "perplexity", ",.2f", less_is_better=True),
    ReportMetric("token_accuracy", "token accuracy", ".1%", less_is_better=False),
    ReportMetric("exact_match", "exact match", ".1%", less_is_better=False),
    ReportMetric("rouge_l", "ROUGE-L", ".1%", less_is_better=False),
)


def make_comparison(report: RunReport) -> tuple[MetricComparison, ...]:
    """Return the metrics that were measured side by side, each with its interval."""
    measured = [metric for metric in REPORT_METRICS if getattr(report.confidence.base, metric.field) is not None]
    return tuple(_compare(metric, report) for metric in measured)


def _compare(metric: ReportMetric, report: RunReport) -> MetricComparison:
    found, sure, style = report.evaluation, report.confidence, metric.number_format
    base, adapter = getattr(found.base, metric.field), getattr(found.adapter, metric.field)
    change = adapter - base
    return MetricComparison(
        metric.label,
        _metric_cell(base, getattr(sure.base, metric.field), style),
        _metric_cell(adapter, getattr(sure.adapter, metric.field), style),
        _metric_cell(change, getattr(sure.change, metric.field), f"+{style}"),
        _tone(change if metric.less_is_better else -change),
    )


def _metric_cell(value: float, interval: Interval, style: str) -> MetricCell:
    return MetricCell(f"{value:{style}}", f"({interval.low:{style}} to {interval.high:{style}})")


def make_plan_rows(report: RunReport) -> tuple[tuple[str, str], ...]:
    """Return how the run was executed."""
    plan, training = report.plan, report.spec.training
    gpus = f", {plan.gpus_per_node} x {plan.gpu_product or 'GPU'} each" if plan.gpus_per_node else ""
    return (
        ("Device", f"{plan.device}: {plan.nodes} node{'s' if plan.nodes > 1 else ''}{gpus}"),
        ("Strategy", f"{plan.strategy}, {plan.processes} process{'es' if plan.processes > 1 else ''}"),
        ("Batch", f"{training.global_batch_size} rows a step, {plan.micro_batch_size} a pass in each process"),
        ("Steps", f"{len(report.history):,} of {plan.total_steps:,}; the adapter is of step {report.adapter_step:,}"),
    )


def make_data_rows(report: RunReport) -> tuple[tuple[str, str], ...]:
    """Return what there was to learn from."""
    data = report.prepared.dataset
    return (
        ("Format", data.format),
        ("Rows", f"{data.training_rows:,} to learn from, {data.evaluation_rows:,} held out"),
        ("Tokens", f"{data.training_tokens:,}, the longest row {data.longest_row_tokens:,}"),
        ("Cut at maxLength", f"{data.truncated_rows:,} rows"),
        ("Left out", f"{data.dropped_rows:,} rows"),
    )


def make_loading_rows(report: RunReport) -> tuple[tuple[str, str], ...]:
    """Return who can load the result."""
    serving = report.serving
    flag = f", with --max-lora-rank {serving.max_lora_rank}" if serving.max_lora_rank else ""
    loads = f"yes{flag}" if serving.vllm else f"no: {'; '.join(serving.problems)}"
    library = "transformers" if report.spec.method == "full" else "PEFT"
    return ((library, "yes, proven in a fresh process"), ("vLLM, by its rules", loads))


def make_tables(report: RunReport) -> tuple[Table, ...]:
    """Return what the run was made of."""
    return (
        Table("Choices by model and hardware", tuple(report.choices.items())),
        Table("Recipe", make_recipe(report)),
        Table("Data", make_data_rows(report)),
        Table("Loading", make_loading_rows(report)),
        *describe_merge(report),
        Table("Lineage", make_lineage(report)),
        Table("Versions", tuple(report.versions.items())),
    )


def describe_merge(report: RunReport) -> tuple[Table, ...]:
    """Return where the merged model's figures are: it is made once the adapter is safe, and this page with it."""
    output = report.spec.output
    if output.merged == "none":
        return ()
    place = f"merged/{output.merge_base} beside the adapter, made after this page"
    return (Table("Merged model", (("Where", place), ("Difference to base and adapter apart", "its merge.json"))),)


def _tone(change: float) -> str:
    """Return how a change of something that should shrink looks."""
    return "good" if change < 0 else "bad" if change > 0 else ""


def format_duration(seconds: float) -> str:
    """Return 3725 as '1 h 2 min'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
