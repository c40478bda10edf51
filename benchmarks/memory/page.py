"""The comparison as a table and as a plot."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from matplotlib.figure import Figure

from benchmarks.memory.comparison import MEDIAN, WORST, Comparison, errors
from benchmarks.trainer.machine import Machine

_MIB: Final = 2**20
_COLUMNS: Final = ("model", "rows", "training", "saved for backward", "predicted", "step peak", "predicted", "error")
_COLORS: Final = ("#2b6cb0", "#d98c3f")

Samples = Mapping[str, Sequence[Comparison]]
"""Comparisons by sample: chosen, drawn."""


def write_page(samples: Samples, machine: Machine, seconds: float) -> str:
    """Return the page in Markdown."""
    return "\n".join(
        [
            "# Activations: predicted and measured",
            "",
            "Memory of a training step besides weights, adapter, gradients and optimizer state, in MiB: predicted by "
            "`qlora_planner.memory`, and measured in torch's allocator. [How](../memory/README.md).",
            "",
            *_summary(samples),
            "",
            "![predicted against measured](memory-cpu.png)",
            *(line for name, comparisons in samples.items() for line in _table(name, comparisons)),
            "",
            f"{machine.processor}, {machine.cores} cores; "
            + ", ".join(f"{name} {number}" for name, number in machine.libraries.items())
            + f"; {seconds / 60:.0f} minutes.",
            "",
        ]
    )


def _summary(samples: Samples) -> list[str]:
    lines = ["| | combinations | step peak: median error | worst | saved for backward: median | worst |"]
    lines.append("|---|---|---|---|---|---|")
    for name, comparisons in samples.items():
        step = errors([each.step_error for each in comparisons])
        kept = errors([each.kept_error for each in comparisons])
        lines.append(
            f"| {name} | {len(comparisons)} | {step.median:.2%} | {step.worst:.2%} | {kept.median:.2%} | "
            f"{kept.worst:.2%} |"
        )
    return [*lines, "", f"Bounds: a median error of {MEDIAN:.0%} and a worst error of {WORST:.0%} of the step peak."]


def _table(name: str, comparisons: Sequence[Comparison]) -> list[str]:
    return [
        "",
        f"## {name.capitalize()}",
        "",
        f"| {' | '.join(_COLUMNS)} |",
        f"|{'---|' * len(_COLUMNS)}",
        *(_row(each) for each in comparisons),
    ]


def _row(each: Comparison) -> str:
    bytes_of = (each.measured.kept, each.predicted.kept, each.measured.step, each.predicted.step)
    sizes = (f"{size / _MIB:.2f}" for size in bytes_of)
    what = each.combination
    return f"| {' | '.join((what.model, what.layout, what.training, *sizes, f'{each.step_error:+.2%}'))} |"


def draw_picture(samples: Samples, path: Path) -> None:
    """Plot predicted against measured peaks, and the errors below them."""
    figure = Figure(figsize=(7, 7), layout="constrained")
    peak_axes, error_axes = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for color, (name, comparisons) in zip(_COLORS, samples.items(), strict=False):
        measured = [each.measured.step / _MIB for each in comparisons]
        peak_axes.scatter(measured, [each.predicted.step / _MIB for each in comparisons], s=18, color=color, label=name)
        error_axes.scatter(measured, [100 * each.step_error for each in comparisons], s=18, color=color)
    ends = [each.measured.step / _MIB for comparisons in samples.values() for each in comparisons]
    peak_axes.plot([min(ends), max(ends)], [min(ends), max(ends)], color="#999999", linewidth=0.8, zorder=0)
    peak_axes.set(xscale="log", yscale="log", ylabel="predicted peak, MiB", title="Memory of a step, without weights")
    peak_axes.legend(frameon=False)
    for bound in (-WORST, -MEDIAN, MEDIAN, WORST):
        error_axes.axhline(100 * bound, color="#cccccc", linewidth=0.8, zorder=0)
    error_axes.set(xlabel="measured peak, MiB", ylabel="error, %", ylim=(-115 * WORST, 115 * WORST))
    figure.savefig(path, dpi=120)
