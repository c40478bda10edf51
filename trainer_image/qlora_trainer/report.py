"""The report as a page: one file that opens offline, on any screen."""

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Final, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from qlora_api import __version__
from qlora_api.report import Interval, RunReport
from qlora_api.v1alpha1 import LoraSpec
from qlora_trainer.chart import Chart

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
class Comparison:
    """One metric of base and adapter."""

    label: str
    base: str
    adapter: str
    change: str
    tone: str


@dataclass(frozen=True)
class Table:
    """Names and values."""

    title: str
    rows: tuple[tuple[str, str], ...]


def render_html(report: RunReport, charts: Iterable[Chart] = ()) -> str:
    """Return the page; whatever comes from the dataset is escaped."""
    environment = Environment(
        loader=PackageLoader("qlora_trainer"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("report.html.j2").render(
        report=report,
        charts=tuple(charts),
        tiles=make_tiles(report),
        comparison=make_comparison(report),
        tables=make_tables(report),
    )


def make_tiles(report: RunReport) -> tuple[Tile, ...]:
    """Return the figures at the top."""
    base, adapter = report.evaluation.base, report.evaluation.adapter
    return (
        Tile("held-out loss", f"{base.loss:.3f} → {adapter.loss:.3f}", _tone(adapter.loss - base.loss)),
        Tile("optimizer steps", f"{len(report.history)}"),
        Tile("training time", duration(report.training_seconds)),
        Tile("tokens per second", f"{report.tokens_per_second:,.0f}"),
        Tile("peak memory", f"{report.peak_memory_bytes / 2**30:.1f} GiB"),
    )


class Metric(NamedTuple):
    """One figure of an evaluation, and how it is shown."""

    field: str
    label: str
    style: str
    less_is_better: bool


METRICS: Final = (
    Metric("loss", "loss, nats per token", ".3f", less_is_better=True),
    Metric("perplexity", "perplexity", ",.2f", less_is_better=True),
    Metric("token_accuracy", "token accuracy", ".1%", less_is_better=False),
    Metric("exact_match", "exact match", ".1%", less_is_better=False),
    Metric("rouge_l", "ROUGE-L", ".1%", less_is_better=False),
)


def make_comparison(report: RunReport) -> tuple[Comparison, ...]:
    """Return the metrics that were measured side by side, each with its interval."""
    measured = [metric for metric in METRICS if getattr(report.confidence.base, metric.field) is not None]
    return tuple(_compare(metric, report) for metric in measured)


def _compare(metric: Metric, report: RunReport) -> Comparison:
    found, sure, style = report.evaluation, report.confidence, metric.style
    base, adapter = getattr(found.base, metric.field), getattr(found.adapter, metric.field)
    change = adapter - base
    return Comparison(
        metric.label,
        _figure(base, getattr(sure.base, metric.field), style),
        _figure(adapter, getattr(sure.adapter, metric.field), style),
        _figure(change, getattr(sure.change, metric.field), f"+{style}"),
        _tone(change if metric.less_is_better else -change),
    )


def _figure(value: float, interval: Interval, style: str) -> str:
    return f"{value:{style}} ({interval.low:{style}} to {interval.high:{style}})"


def make_recipe(report: RunReport) -> tuple[tuple[str, str], ...]:
    """Return what decided the adapter beside model and data."""
    spec, training = report.spec, report.spec.training
    adapter = () if spec.method == "full" else (("Adapter", describe_adapter(spec.lora)),)
    return (
        ("Method", f"{spec.method}, {spec.quantization.bits}-bit base"),
        *adapter,
        ("Learning rate", f"{training.learning_rate:g}, {training.scheduler}, {training.warmup_ratio:.0%} warm-up"),
        ("Global batch", f"{training.global_batch_size} rows, in micro-batches of {report.plan.micro_batch_size}"),
        ("Seed", str(training.seed)),
    )


def describe_adapter(lora: LoraSpec) -> str:
    """Return an adapter's settings in a line."""
    kinds = [kind for kind, chosen in (("DoRA", lora.dora), ("rsLoRA", lora.rslora)) if chosen]
    start = [] if lora.init == "default" else [f"started by {lora.init}"]
    whole = [f"with all of {', '.join(lora.modules_to_save)}"] if lora.modules_to_save else []
    settings = f"{' '.join([*kinds, 'rank'])} {lora.rank}, alpha {lora.alpha}, dropout {lora.dropout}"
    return " ".join([settings, "on", ", ".join(lora.targets), *whole, *start])


def make_tables(report: RunReport) -> tuple[Table, ...]:
    """Return what the run was made of."""
    plan, data, serving = report.plan, report.prepared.dataset, report.serving
    rows = (
        ("Format", data.format),
        ("Rows", f"{data.training_rows:,} to learn from, {data.evaluation_rows:,} held out"),
        ("Tokens", f"{data.training_tokens:,}, the longest row {data.longest_row_tokens:,}"),
        ("Cut at maxLength", f"{data.truncated_rows:,} rows"),
        ("SHA-256", data.digest),
    )
    reasons = tuple((f"{number}", reason) for number, reason in enumerate(plan.reasons, start=1))
    flag = f", with --max-lora-rank {serving.max_lora_rank}" if serving.max_lora_rank else ""
    loads = f"yes{flag}" if serving.vllm else f"no: {'; '.join(serving.problems)}"
    library = "transformers" if report.spec.method == "full" else "PEFT"
    return (
        Table("Recipe", make_recipe(report)),
        Table("Data", rows),
        Table("Loading", ((library, "yes, proven in a fresh process"), ("vLLM, by its rules", loads))),
        *describe_merge(report),
        Table("Choices", tuple(report.choices.items())),
        *((Table("Plan", reasons),) if reasons else ()),
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


def duration(seconds: float) -> str:
    """Return 3725 as '1 h 2 min'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
