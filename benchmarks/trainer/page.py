"""The results as a table and as a plot."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.trainer.machine import Machine
from benchmarks.trainer.measurement import Measurement
from benchmarks.trainer.summary import Figures, Ratio, compare, summarize

OURS: Final = "ours"
_GIB: Final = 2**30
_COLUMNS: Final = (
    "contender",
    "useful tok/s",
    "label tok/s",
    "useful tok per CPU second",
    "startup",
    "peak memory",
    "training time",
    "final held-out loss",
)
_COLORS: Final = {"recipe": "#999999", "trl": "#d98c3f", "trl-fastest": "#b5541c", OURS: "#2b6cb0"}

Runs = Mapping[str, Sequence[Measurement]]
"""The runs of each contender, in the order of the rounds."""


def write_page(title: str, runs: Runs, machine: Machine) -> str:
    """Return the table in Markdown."""
    figures = [summarize(measurements) for measurements in runs.values()]
    ratios = [compare(runs[OURS], theirs) for name, theirs in runs.items() if name != OURS]
    rounds = len(runs[OURS])
    return "\n".join(
        [
            f"# {title}",
            "",
            f"{rounds} rounds, contenders in turn; medians. [How](../trainer/README.md).",
            "",
            *_figures_table(figures),
            "",
            *_ratio_table(ratios),
            "",
            *_machine_lines(machine),
            "",
        ]
    )


def _figures_table(figures: Sequence[Figures]) -> list[str]:
    return [
        f"| {' | '.join(_COLUMNS)} |",
        f"|{'---|' * len(_COLUMNS)}",
        *(
            f"| {row.contender} | {row.useful_per_second:.0f} | {row.learned_per_second:.0f} | "
            f"{row.useful_per_cpu_second:.0f} | {row.startup_seconds:.0f} s | {row.peak_memory_bytes / _GIB:.2f} GiB | "
            f"{row.last_training_seconds:.0f} s | {_number(row.last_loss, '.3f')} |"
            for row in figures
        ),
    ]


def _ratio_table(ratios: Sequence[Ratio]) -> list[str]:
    return [
        "| ours vs. | useful tokens per second | training time to its final loss |",
        "|---|---|---|",
        *(f"| {row.other} | {row.speed:.2f} x | {_time_to_loss(row)} |" for row in ratios),
    ]


def _time_to_loss(ratio: Ratio) -> str:
    if not ratio.learned:
        return "its loss did not improve"
    return "not reached" if ratio.time_to_loss is None else f"{ratio.time_to_loss:.2f} x"


def _machine_lines(machine: Machine) -> list[str]:
    libraries = ", ".join(f"{name} {version}" for name, version in machine.libraries.items())
    return [
        f"- {machine.processor}, {machine.cores} cores, {machine.memory_gib} GiB",
        *([f"- {machine.gpu}"] if machine.gpu else []),
        f"- {machine.system}; {libraries}",
        f"- load before the start: {machine.load}",
    ]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def draw(title: str, runs: Runs, path: Path) -> None:
    """Draw the throughput, and the held-out loss over the training time if it was evaluated."""
    evaluated = any(run.evaluations for measurements in runs.values() for run in measurements)
    figure = Figure(figsize=(10 if evaluated else 5, 4), layout="constrained")
    axes = figure.subplots(1, 2 if evaluated else 1, squeeze=False)[0]
    figure.suptitle(title)
    speeds = {name: summarize(measurements).useful_per_second for name, measurements in runs.items()}
    bars = axes[0].barh(list(speeds), list(speeds.values()), color=[_COLORS[name] for name in speeds])
    axes[0].bar_label(bars, fmt="%.0f", padding=3)
    axes[0].margins(x=0.15)
    axes[0].set_xlabel("useful tokens per second")
    axes[0].invert_yaxis()
    if evaluated:
        _draw_losses(axes[1], runs)
    figure.savefig(path, dpi=120)


def _draw_losses(axis: Axes, runs: Runs) -> None:
    for name, measurements in runs.items():
        for number, run in enumerate(measurements):
            seconds = [evaluation.training_seconds for evaluation in run.evaluations]
            losses = [evaluation.loss for evaluation in run.evaluations]
            axis.plot(seconds, losses, color=_COLORS[name], marker=".", label=None if number else name)
    axis.set_xlabel("training time (s)")
    axis.set_ylabel("held-out loss")
    axis.legend()
