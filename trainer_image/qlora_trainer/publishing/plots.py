"""The plots of a report: loss, held-out rows, learning rate, gradient norm and throughput.

The loss is also a PNG file; the HTML report has all plots as inline SVG in its own colors, so that they follow its
light or dark theme.
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

# On import matplotlib reads ./matplotlibrc, which could have it run LaTeX.
mpl.rcdefaults()

Item = TypeVar("Item")

_RAW: Final = "#8fb0ea"
_SMOOTH: Final = "#4a86e8"
_BASE: Final = "#8a94a3"
_ADAPTER: Final = "#2f9e62"
"""Colors with enough contrast on white and on black."""
_INK, _LINE = "#010203", "#030201"
"""Placeholders that `to_inline_svg` replaces with the page's colors of text and lines."""
_EMA_DECAY: Final = 0.9
"""Decay of the exponential moving average of the loss; the raw loss is drawn behind it."""
_SMOOTH_FROM_STEPS: Final = 20
"""With fewer steps only the raw loss is drawn: an average would lag behind it."""
_MAX_POINTS: Final = 1000
"""Points per line or scatter plot: more would add megabytes to the page and no visible detail."""
_PLOT_INCHES: Final = (4.0, 3.0)
_TALL_INCHES: Final = (4.0, 3.9)
"""Size of the first two plots, one of which has a long legend."""
_FONT_POINTS: Final = 12.5
"""14 px on a screen 390 px wide, and 12 or 19 px in a layout of three or two columns."""
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
    """A plot with its title and caption."""

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
    """Yield the plots of the page, leaving out those without data."""
    base, adapter = report.evaluation.base, report.evaluation.adapter
    caption = f"Held-out loss went from {base.loss:.3f} to {adapter.loss:.3f}."
    yield _draw("Loss", caption, lambda axes: _plot_loss(axes, report), _TALL_INCHES)
    yield _draw("Each held-out row", describe_rows(rows), lambda axes: _plot_rows(axes, rows), _TALL_INCHES)
    if report.held_out:
        yield _draw("Held-out loss", _describe_validations(report), lambda axes: _plot_validations(axes, report))
    yield _draw(
        "Learning rate",
        f"{report.spec.training.scheduler}, {report.spec.training.learning_rate:g} at its peak.",
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
    """Return matplotlib's SVG for inlining: without a size, in the page's colors, and with an ARIA label."""
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
        shown_steps = [steps[index] for index in shown]
        axes.plot(shown_steps, [losses[index] for index in shown], color=_RAW, linewidth=1, label="training, each step")
        axes.plot(
            shown_steps, [smooth[index] for index in shown], color=_SMOOTH, linewidth=2, label="training, smoothed"
        )
    if report.held_out:
        points = [record.step for record in report.held_out], [record.loss for record in report.held_out]
        axes.plot(*points, color=_ADAPTER, linewidth=1.6, marker="o", markersize=4, label="held out, during training")
    _plot_base_and_adapter(axes, report)
    _label_steps(axes, "nats per token")
    axes.figure.legend(loc="outside lower center", ncols=legend_columns, frameon=False)


def _plot_base_and_adapter(axes: Axes, report: RunReport) -> None:
    """Draw the held-out loss of base and adapter as horizontal lines."""
    evaluation = report.evaluation
    for metrics, name, color in ((evaluation.base, "base", _BASE), (evaluation.adapter, "adapter", _ADAPTER)):
        label = f"held out, {name}: {metrics.loss:.3f}"
        axes.axhline(metrics.loss, color=color, linewidth=1.6, linestyle="--", label=label)


def _plot_validations(axes: Axes, report: RunReport) -> None:
    points = [record.step for record in report.held_out], [record.loss for record in report.held_out]
    axes.plot(*points, color=_ADAPTER, linewidth=2, marker="o", markersize=4, label="each evaluation")
    axes.axvline(report.adapter_step, color=_SMOOTH, linewidth=1.2, linestyle=":", label="the adapter")
    _label_steps(axes, "nats per token")
    axes.legend(frameon=False)


def _describe_validations(report: RunReport) -> str:
    best = min(report.held_out, key=lambda record: record.loss)
    lowest = f"lowest loss {best.loss:.3f} after step {best.step}"
    return (
        f"{len(report.held_out)} evaluations during training, {lowest}; the adapter is from step {report.adapter_step}."
    )


def _plot_rows(axes: Axes, rows: Sequence[EvaluatedRow]) -> None:
    shown = subsample(rows)
    base = [row.base.loss / row.tokens for row in shown]
    adapter = [row.adapter.loss / row.tokens for row in shown]
    top = max([*base, *adapter]) * 1.05
    axes.plot([0, top], [0, top], color=_BASE, linewidth=1.4, linestyle="--", label="no change")
    axes.scatter(base, adapter, s=14, color=_SMOOTH, alpha=0.6, linewidths=0, label="one row")
    axes.set(xlim=(0, top), ylim=(0, top), xlabel="base, nats per token", ylabel="adapter, nats per token")
    axes.legend(frameon=False, loc="upper left")


def describe_rows(rows: Sequence[EvaluatedRow]) -> str:
    """Return how many rows have a lower loss with the adapter."""
    better = sum(row.adapter.loss < row.base.loss for row in rows)
    sampled = f" {len(subsample(rows)):,} of them are drawn." if len(rows) > _MAX_POINTS else ""
    return f"{better:,} of {len(rows):,} rows ({better / len(rows):.0%}) have a lower loss, below the line.{sampled}"


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
    axes.plot([report.history[index].step for index in shown], [values[index] for index in shown], color=_SMOOTH)
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", scilimits=(-3, 5))
    _label_steps(axes, "")


def _label_steps(axes: Axes, values: str) -> None:
    axes.set(xlabel="optimizer step", ylabel=values)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def subsample(items: Sequence[Item]) -> list[Item]:
    """Return at most _MAX_POINTS of the items, evenly spaced, including the first and the last."""
    count = len(items)
    if count <= _MAX_POINTS:
        return list(items)
    return [items[round(index * (count - 1) / (_MAX_POINTS - 1))] for index in range(_MAX_POINTS)]


def exponential_moving_average(values: Sequence[float]) -> list[float]:
    """Return the exponential moving average, corrected for its bias towards zero at the start."""
    average, weight, result = 0.0, 0.0, []
    for value in values:
        average = _EMA_DECAY * average + (1 - _EMA_DECAY) * value
        weight = _EMA_DECAY * weight + (1 - _EMA_DECAY)
        result.append(average / weight)
    return result
