"""The comparison as a table and as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from matplotlib.figure import Figure

from benchmarks.memory.comparison import MEDIAN, WORST, Comparison, errors
from benchmarks.trainer.machine import Machine

_MIB: Final = 2**20
_COLUMNS: Final = ("model", "rows", "training", "forward keeps", "predicted", "step's peak", "predicted", "error")
_COLORS: Final = ("#2b6cb0", "#d98c3f")

Samples = Mapping[str, Sequence[Comparison]]
"""Comparisons by what they are: chosen, drawn."""


def write_page(samples: Samples, machine: Machine, seconds: float) -> str:
    """Return the page in Markdown."""
    return "\n".join(
        [
            "# Activations: predicted and measured",
            "",
            "Bytes that a training step takes beside weights, adapter, gradients and optimizer state, in MiB: what "
            "`plan/activations.py` says, and what torch's allocator gave out. [How](../memory/README.md).",
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
    lines = ["| | combinations | a step's peak: median error | worst | what forward keeps: median | worst |"]
    lines.append("|---|---|---|---|---|---|")
    for name, comparisons in samples.items():
        step = errors([each.step_error for each in comparisons])
        kept = errors([each.kept_error for each in comparisons])
        lines.append(
            f"| {name} | {len(comparisons)} | {step.median:.2%} | {step.worst:.2%} | {kept.median:.2%} | "
            f"{kept.worst:.2%} |"
        )
    return [*lines, "", f"Held to a median of {MEDIAN:.0%} and a worst of {WORST:.0%} of a step's peak."]


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
    """Draw predicted against measured peaks, and the errors below."""
    figure = Figure(figsize=(7, 7), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for colour, (name, comparisons) in zip(_COLORS, samples.items(), strict=False):
        measured = [each.measured.step / _MIB for each in comparisons]
        above.scatter(measured, [each.predicted.step / _MIB for each in comparisons], s=18, color=colour, label=name)
        below.scatter(measured, [100 * each.step_error for each in comparisons], s=18, color=colour)
    ends = [each.measured.step / _MIB for comparisons in samples.values() for each in comparisons]
    above.plot([min(ends), max(ends)], [min(ends), max(ends)], color="#999999", linewidth=0.8, zorder=0)
    above.set(xscale="log", yscale="log", ylabel="predicted peak, MiB", title="A step's memory beside its weights")
    above.legend(frameon=False)
    for bound in (-WORST, -MEDIAN, MEDIAN, WORST):
        below.axhline(100 * bound, color="#cccccc", linewidth=0.8, zorder=0)
    below.set(xlabel="measured peak, MiB", ylabel="error, %", ylim=(-115 * WORST, 115 * WORST))
    figure.savefig(path, dpi=120)
