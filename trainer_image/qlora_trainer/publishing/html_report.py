"""The HTML report: one self-contained file that opens offline, on any screen size."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Final, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from qlora_api import __version__
from qlora_api.escapes import escape_text
from qlora_api.report import Interval, RunReport
from qlora_api.significance import describe_small_validation
from qlora_api.units import format_gib
from qlora_api.v1alpha1 import DataStatus
from qlora_trainer.publishing.plots import Plot
from qlora_trainer.publishing.report_sections import make_footprint, make_lineage, make_recipe

_OPEN_SAMPLES: Final = 4
"""Samples that are shown at first; the others are collapsed."""
_LIBRARIES: Final = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that determine what a run computes."""
    return {"qlora-operator": __version__} | {name: version(name) for name in _LIBRARIES}


@dataclass(frozen=True)
class Tile:
    """A key figure at the top of the page."""

    label: str
    value: str
    tone: str = ""


@dataclass(frozen=True)
class MetricCell:
    """A value and its confidence interval."""

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
    """A titled table of labels and values."""

    title: str
    rows: tuple[tuple[str, str], ...]


def render_html(report: RunReport, charts: Iterable[Plot] = ()) -> str:
    """Return the HTML page; text from the dataset is escaped, and so is what would reorder or hide text."""
    environment = Environment(
        loader=PackageLoader("qlora_trainer"),
        autoescape=True,
        finalize=_escape_unprintable,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        report=report,
        charts=tuple(charts),
        tiles=make_tiles(report),
        comparison=make_comparison(report),
        small_validation=describe_small_validation(report.evaluation.rows, report.evaluation.tokens),
        plan=make_plan_rows(report),
        open_samples=_OPEN_SAMPLES,
        footprint=make_footprint(report.plan, report.spec.resources.memory, report.peak_memory_bytes),
        tables=make_tables(report),
    )


def _escape_unprintable(value: Any) -> Any:
    return type(value)(escape_text(value)) if type(value) in {str, Markup} else value


def make_tiles(report: RunReport) -> tuple[Tile, ...]:
    """Return the key figures at the top of the page."""
    base, adapter, predicted = report.evaluation.base, report.evaluation.adapter, report.plan.peak_bytes
    expected = f", {format_gib(predicted, 2)} predicted" if predicted is not None else ""
    return (
        Tile("held-out loss", f"{base.loss:.3f} → {adapter.loss:.3f}", _tone(adapter.loss - base.loss, report)),
        Tile("optimizer steps", f"{len(report.history)}"),
        Tile("training time", format_duration(report.training_seconds)),
        Tile("tokens per second", f"{report.tokens_per_second:,.0f}"),
        Tile(f"peak memory{expected}", format_gib(report.peak_memory_bytes, 2)),
    )


class ReportMetric(NamedTuple):
    """One metric of an evaluation, and how it is formatted."""

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
    """Return the measured metrics of base and adapter, each with its confidence interval."""
    measured = [metric for metric in REPORT_METRICS if getattr(report.confidence.base, metric.field) is not None]
    return tuple(_compare(metric, report) for metric in measured)


def _compare(metric: ReportMetric, report: RunReport) -> MetricComparison:
    evaluation, confidence, number_format = report.evaluation, report.confidence, metric.number_format
    base, adapter = getattr(evaluation.base, metric.field), getattr(evaluation.adapter, metric.field)
    change = adapter - base
    return MetricComparison(
        metric.label,
        _metric_cell(base, getattr(confidence.base, metric.field), number_format),
        _metric_cell(adapter, getattr(confidence.adapter, metric.field), number_format),
        _metric_cell(change, getattr(confidence.change, metric.field), f"+{number_format}"),
        _tone(change if metric.less_is_better else -change, report),
    )


def _metric_cell(value: float, interval: Interval, number_format: str) -> MetricCell:
    return MetricCell(
        f"{value:{number_format}}", f"({interval.low:{number_format}} to {interval.high:{number_format}})"
    )


def make_plan_rows(report: RunReport) -> tuple[tuple[str, str], ...]:
    """Return device, strategy, batch and steps of the run."""
    plan, training = report.plan, report.spec.training
    gpus = f", {plan.gpus_per_node} x {plan.gpu_product or 'GPU'} each" if plan.gpus_per_node else ""
    return (
        ("Device", f"{plan.device}: {plan.nodes} node{'s' if plan.nodes > 1 else ''}{gpus}"),
        ("Strategy", f"{plan.strategy}, {plan.processes} process{'es' if plan.processes > 1 else ''}"),
        (
            "Batch",
            f"{training.global_batch_size} rows per step, micro-batches of {plan.micro_batch_size} rows per process",
        ),
        ("Steps", f"{len(report.history):,} of {plan.total_steps:,}; the adapter is from step {report.adapter_step:,}"),
    )


def make_data_rows(report: RunReport) -> tuple[tuple[str, str], ...]:
    """Return format and size of the dataset."""
    data = report.prepared.dataset
    return (
        ("Format", data.format),
        ("Rows", f"{data.training_rows:,} for training, {data.evaluation_rows:,} held out"),
        ("Tokens", f"{data.training_tokens:,}, the longest row {data.longest_row_tokens:,}"),
        ("Truncated to maxLength", f"{data.truncated_rows:,} rows"),
        ("Dropped", f"{data.dropped_rows:,} rows"),
        *_invalid_rows(data),
    )


def _invalid_rows(data: DataStatus) -> Iterator[tuple[str, str]]:
    """Yield what was left out or split, if anything was."""
    if data.invalid_rows:
        more = " …" if data.invalid_rows > len(data.invalid_row_numbers) else ""
        yield "Left out as invalid", f"{data.invalid_rows:,} rows: {', '.join(data.invalid_row_numbers)}{more}"
    if data.split_rows:
        yield "Split", f"{data.split_rows:,} conversations, one row per answer that the chat template rewrites later"


def make_loading_rows(report: RunReport) -> tuple[tuple[str, str], ...]:
    """Return which libraries can load the result."""
    serving = report.serving
    flag = f", with --max-lora-rank {serving.max_lora_rank}" if serving.max_lora_rank else ""
    loads = f"yes{flag}" if serving.vllm else f"no: {'; '.join(serving.problems)}"
    library = "transformers" if report.spec.method == "full" else "PEFT"
    return ((library, "yes, verified in a fresh process"), ("vLLM (static check)", loads))


def make_tables(report: RunReport) -> tuple[Table, ...]:
    """Return the tables at the end of the page."""
    return (
        Table("Settings chosen for this model and hardware", tuple(report.choices.items())),
        Table("Training settings", make_recipe(report)),
        Table("Data", make_data_rows(report)),
        Table("Loading", make_loading_rows(report)),
        *describe_merge(report),
        Table("Lineage", make_lineage(report)),
        Table("Versions", tuple(report.versions.items())),
    )


def describe_merge(report: RunReport) -> tuple[Table, ...]:
    """Return where the merged model is; it is made after this page, which is published with the adapter."""
    output = report.spec.output
    if output.merged == "none":
        return ()
    location = f"merged/{output.merge_base} next to the adapter, made after this page"
    return (
        Table("Merged model", (("Location", location), ("Difference from the unmerged model", "in its merge.json"))),
    )


def _tone(change: float, report: RunReport) -> str:
    """Return the CSS class for a change of a metric that should decrease; none if too few rows were evaluated."""
    if describe_small_validation(report.evaluation.rows, report.evaluation.tokens):
        return ""
    return "good" if change < 0 else "bad" if change > 0 else ""


def format_duration(seconds: float) -> str:
    """Return 3725 as '1 h 2 min'."""
    minutes, seconds_left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds_left} s" if minutes else f"{seconds_left} s"
