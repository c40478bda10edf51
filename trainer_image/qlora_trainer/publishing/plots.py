"""The pictures of a run: what was learned, what it meant for each held-out row, and how the training went.

One of them is a file; all are on the page, as SVG in its own colours, so that they are sharp on any screen and as dark
or light as it is.
"""

import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from qlora_api.report import EvaluatedRow, RunReport

Item = TypeVar("Item")

_RAW: Final = "#8fb0ea"
_SMOOTH: Final = "#4a86e8"
_BASE: Final = "#8a94a3"
_ADAPTER: Final = "#2f9e62"
"""Seen on white and on black alike."""
_INK, _LINE = "#010203", "#030201"
"""Stand for the page's own colours of text and lines, which are not known here."""
_EMA_DECAY: Final = 0.9
"""Weight of the past in the smoothed line; the raw one is drawn behind it."""
_SMOOTH_FROM_STEPS: Final = 20
"""Fewer steps are drawn as they are: a smoothed line would lag behind them."""
_MAX_POINTS: Final = 1000
"""Of a scatter or a line: more make a page of megabytes and no other picture."""
_PLOT_INCHES: Final = (4.0, 3.0)
_TALL_INCHES: Final = (4.0, 3.9)
"""Of the first two, one of which has a long legend."""
_FONT_POINTS: Final = 12.5
"""14 pixels on a phone of 390, and 12 or 19 in one of three or two columns."""
_STYLE: Final[dict[Any, Any]] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "qlora",
    "font.size": _FONT_POINTS,
    "legend.fontsize": "medium",
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _LINE,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _LINE,
}


@dataclass(frozen=True)
class Plot:
    """A picture for the page."""

    title: str
    caption: str
    svg: str


def draw_loss(report: RunReport) -> bytes:
    """Return the loss over the steps as PNG."""
    figure = Figure(figsize=(9, 4.5), dpi=140, layout="constrained")
    axes = _axes(figure)
    axes.grid(color="#e6eaf0")
    _plot_loss(axes, report, legend_columns=2)
    sink = io.BytesIO()
    figure.savefig(sink, format="png")
    return sink.getvalue()


def draw_plots(report: RunReport, rows: Sequence[EvaluatedRow]) -> Iterator[Plot]:
    """Yield the pictures of the page, each where there is something to see."""
    base, adapter = report.evaluation.base, report.evaluation.adapter
    course = f"Held out, it went from {base.loss:.3f} to {adapter.loss:.3f}."
    yield _draw("Loss", course, lambda axes: _plot_loss(axes, report), _TALL_INCHES)
    yield _draw("Each held-out row", describe_rows(rows), lambda axes: _plot_rows(axes, rows), _TALL_INCHES)
    if report.held_out:
        yield _draw("Held-out loss", _describe_validations(report), lambda axes: _plot_validations(axes, report))
    yield _draw(
        "Learning rate",
        f"{report.spec.training.scheduler}, {report.spec.training.learning_rate:g} at its highest.",
        lambda axes: _plot_steps(axes, report, [record.learning_rate for record in report.history]),
    )
    yield _draw("Gradient norm", _describe_norms(report), lambda axes: _plot_norms(axes, report))
    speeds = [record.tokens / record.seconds for record in report.history if record.seconds]
    if len(speeds) == len(report.history):
        caption = f"{report.tokens_per_second:,.0f} tokens per second over all steps."
        yield _draw("Tokens per second", caption, lambda axes: _plot_steps(axes, report, speeds))


def _draw(title: str, caption: str, plot: Callable[[Axes], None], inches: tuple[float, float] = _PLOT_INCHES) -> Plot:
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=inches, layout="constrained")
        axes = _axes(figure)
        plot(axes)
        sink = io.StringIO()
        figure.savefig(sink, format="svg", transparent=True, metadata={"Date": None})
    return Plot(title, caption, to_inline_svg(sink.getvalue(), f"{title}. {caption}"))


def to_inline_svg(svg: str, label: str) -> str:
    """Return matplotlib's SVG as a part of a page: without a size, in the page's colours, and with what it shows."""
    body = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    body = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", body)
    body = body.replace(_INK, "currentColor").replace(_LINE, "var(--line)").replace(_RAW, "var(--raw)")
    head, rest = body.split(">", 1)
    (box,) = re.findall(r'viewBox="[^"]+"', head)
    return f'<svg {box} xmlns:xlink="http://www.w3.org/1999/xlink" role="img" aria-label="{label}">{rest}'


def _axes(figure: Figure) -> Axes:
    axes = figure.add_subplot()
    axes.grid(linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _plot_loss(axes: Axes, report: RunReport, legend_columns: int = 1) -> None:
    steps, losses = [record.step for record in report.history], [record.loss for record in report.history]
    if len(steps) < _SMOOTH_FROM_STEPS:
        axes.plot(steps, losses, color=_SMOOTH, linewidth=2, marker="o", markersize=3, label="training")
    else:
        shown = subsample(range(len(steps)))
        smooth = exponential_moving_average(losses)
        at = [steps[place] for place in shown]
        axes.plot(at, [losses[place] for place in shown], color=_RAW, linewidth=1, label="training, each step")
        axes.plot(at, [smooth[place] for place in shown], color=_SMOOTH, linewidth=2, label="training, smoothed")
    if report.held_out:
        looks = [record.step for record in report.held_out], [record.loss for record in report.held_out]
        axes.plot(*looks, color=_ADAPTER, linewidth=1.6, marker="o", markersize=4, label="held out, while training")
    _plot_base_and_adapter(axes, report)
    _label_steps(axes, "nats per token")
    axes.figure.legend(loc="outside lower center", ncols=legend_columns, frameon=False)


def _plot_base_and_adapter(axes: Axes, report: RunReport) -> None:
    """Draw where base and adapter stand on the held-out rows."""
    found = report.evaluation
    for metrics, name, colour in ((found.base, "base", _BASE), (found.adapter, "adapter", _ADAPTER)):
        label = f"held out, {name}: {metrics.loss:.3f}"
        axes.axhline(metrics.loss, color=colour, linewidth=1.6, linestyle="--", label=label)


def _plot_validations(axes: Axes, report: RunReport) -> None:
    looks = [record.step for record in report.held_out], [record.loss for record in report.held_out]
    axes.plot(*looks, color=_ADAPTER, linewidth=2, marker="o", markersize=4, label="each look")
    axes.axvline(report.adapter_step, color=_SMOOTH, linewidth=1.2, linestyle=":", label="the adapter")
    _label_steps(axes, "nats per token")
    axes.legend(frameon=False)


def _describe_validations(report: RunReport) -> str:
    best = min(report.held_out, key=lambda record: record.loss)
    kept = f"the adapter is that of step {report.adapter_step}"
    return f"{len(report.held_out)} looks while training, the lowest {best.loss:.3f} after step {best.step}; {kept}."


def _plot_rows(axes: Axes, rows: Sequence[EvaluatedRow]) -> None:
    shown = subsample(rows)
    base = [row.base.loss / row.tokens for row in shown]
    adapter = [row.adapter.loss / row.tokens for row in shown]
    top = max([*base, *adapter]) * 1.05
    axes.plot([0, top], [0, top], color=_BASE, linewidth=1.4, linestyle="--", label="no change")
    axes.scatter(base, adapter, s=14, color=_SMOOTH, alpha=0.6, linewidths=0, label="a row")
    axes.set(xlim=(0, top), ylim=(0, top), xlabel="base, nats per token", ylabel="adapter, nats per token")
    axes.legend(frameon=False, loc="upper left")


def describe_rows(rows: Sequence[EvaluatedRow]) -> str:
    """Return how many rows the adapter made better."""
    better = sum(row.adapter.loss < row.base.loss for row in rows)
    shown = f" {len(subsample(rows)):,} of them are drawn." if len(rows) > _MAX_POINTS else ""
    return f"{better:,} of {len(rows):,} rows ({better / len(rows):.0%}) have a lower loss, below the line.{shown}"


def _plot_norms(axes: Axes, report: RunReport) -> None:
    bound = report.spec.training.max_grad_norm
    axes.axhline(bound, color=_BASE, linewidth=1.4, linestyle="--", label=f"clipped above {bound:g}")
    _plot_steps(axes, report, [record.grad_norm for record in report.history])
    axes.legend(frameon=False)


def _describe_norms(report: RunReport) -> str:
    bound, history = report.spec.training.max_grad_norm, report.history
    clipped = sum(record.grad_norm > bound for record in history)
    return f"Before clipping; {clipped:,} of {len(history):,} steps ({clipped / len(history):.0%}) were clipped."


def _plot_steps(axes: Axes, report: RunReport, values: Sequence[float]) -> None:
    shown = subsample(range(len(values)))
    axes.plot([report.history[place].step for place in shown], [values[place] for place in shown], color=_SMOOTH)
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", scilimits=(-3, 5))
    _label_steps(axes, "")


def _label_steps(axes: Axes, values: str) -> None:
    axes.set(xlabel="optimizer step", ylabel=values)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def subsample(items: Sequence[Item]) -> list[Item]:
    """Return at most _DRAWN_POINTS of the items, evenly, the last one among them."""
    count = len(items)
    if count <= _MAX_POINTS:
        return list(items)
    return [items[round(place * (count - 1) / (_MAX_POINTS - 1))] for place in range(_MAX_POINTS)]


def exponential_moving_average(values: Sequence[float]) -> list[float]:
    """Return the exponential moving average, without a pull towards zero at the start."""
    average, weight, result = 0.0, 0.0, []
    for value in values:
        average = _EMA_DECAY * average + (1 - _EMA_DECAY) * value
        weight = _EMA_DECAY * weight + (1 - _EMA_DECAY)
        result.append(average / weight)
    return result
