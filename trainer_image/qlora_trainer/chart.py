"""The picture of a run: training loss over the steps, and what it meant for the held-out rows."""

import io
from collections.abc import Sequence
from typing import Final

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from qlora_api.report import RunReport

_RAW: Final = "#a9c3ee"
_SMOOTH: Final = "#2f6fde"
_BASE: Final = "#8a94a3"
_ADAPTER: Final = "#1a7f4b"
_SMOOTHING: Final = 0.9
"""Weight of the past in the smoothed line; the raw one is drawn behind it."""
_SMOOTH_FROM_STEPS: Final = 20
"""Fewer steps are drawn as they are: a smoothed line would lag behind them."""


def draw_loss(report: RunReport) -> bytes:
    """Return the picture as PNG."""
    history, evaluation = report.history, report.evaluation
    figure = Figure(figsize=(9, 4.5), dpi=140, layout="constrained")
    axes = figure.add_subplot()
    steps, losses = [record.step for record in history], [record.loss for record in history]
    if len(steps) < _SMOOTH_FROM_STEPS:
        axes.plot(steps, losses, color=_SMOOTH, linewidth=2, marker="o", markersize=3, label="training")
    else:
        axes.plot(steps, losses, color=_RAW, linewidth=1, label="training, each step")
        axes.plot(steps, smoothed(losses), color=_SMOOTH, linewidth=2, label="training, smoothed")
    if report.held_out:
        looks = [record.step for record in report.held_out], [record.loss for record in report.held_out]
        axes.plot(*looks, color=_ADAPTER, linewidth=1.6, marker="o", markersize=4, label="held out, while training")
    for metrics, name, colour in ((evaluation.base, "base", _BASE), (evaluation.adapter, "adapter", _ADAPTER)):
        label = f"held out, {name}: {metrics.loss:.3f}"
        axes.axhline(metrics.loss, color=colour, linewidth=1.6, linestyle="--", label=label)
    axes.set(xlabel="optimizer step", ylabel="cross-entropy, nats per token")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color="#e6eaf0", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    sink = io.BytesIO()
    figure.savefig(sink, format="png")
    return sink.getvalue()


def smoothed(values: Sequence[float]) -> list[float]:
    """Return the exponential moving average, without a pull towards zero at the start."""
    average, weight, result = 0.0, 0.0, []
    for value in values:
        average = _SMOOTHING * average + (1 - _SMOOTHING) * value
        weight = _SMOOTHING * weight + (1 - _SMOOTHING)
        result.append(average / weight)
    return result
