"""`make bench-trainer` and `make gpu`: run all contenders in turn, and write table, plot and raw results."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

import torch

from benchmarks.trainer.machine import Machine, observe_machine
from benchmarks.trainer.measurement import Measurement
from benchmarks.trainer.models import SHAPES, make_random_model
from benchmarks.trainer.page import Runs, draw, write_page
from benchmarks.trainer.task import Task
from examples.quickstart.make_model import DEFAULT_MIRROR, make_model

RESULTS: Final = Path(__file__).parents[1] / "results"
CONTENDERS: Final = {
    "recipe": ["benchmarks.trainer.contenders.recipe"],
    "trl": ["benchmarks.trainer.contenders.trl"],
    "trl-fastest": ["benchmarks.trainer.contenders.trl", "--fastest"],
    "ours": ["benchmarks.trainer.contenders.ours"],
}
STEPS: Final = {"cpu": {"recipe": 4, "trl": 8, "trl-fastest": 12, "ours": 20}, "cuda": dict.fromkeys(CONTENDERS, 12)}
"""Steps of each contender, for about equal time each. The learning rate is constant, so that none has an advantage."""
EVALUATIONS: Final = 4
"""Evaluations on held-out rows during the training of a contender."""
RECIPE_LENGTH: Final = {"cpu": 256, "cuda": 1024}
"""Tokens to which the recipe pads: common values of tutorials for short and for long answers."""


def main() -> int:
    """Run a comparison, and return the exit code."""
    options = parse()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("PyTorch finds no GPU on this machine; run `make gpu` on one that has a GPU.")
        return 1
    for name, task in make_tasks(options.device).items():
        run(name, task, options.rounds, options.contenders)
    return 0


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.trainer", description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    return parser.parse_args()


def make_tasks(device: str) -> dict[str, Task]:
    """Return the comparisons of a device, by name; missing models are created."""
    small = make_model(DEFAULT_MIRROR, print)
    if device == "cpu":
        return {"SmolLM2-135M": Task(str(small), "cpu", RECIPE_LENGTH["cpu"])}
    models = {name: make_random_model(name, small) for name in SHAPES}
    return {
        name: Task(str(folder), "cuda", RECIPE_LENGTH["cuda"], long_rows=True, evaluation_rows=0)
        for name, folder in models.items()
    }


def run(name: str, task: Task, rounds: int, contenders: Sequence[str]) -> None:
    """Run one comparison and write its results."""
    machine, folder = observe_machine(), RESULTS / f"{task.device}-{name.lower()}"
    folder.mkdir(parents=True, exist_ok=True)
    runs: dict[str, list[Measurement]] = {contender: [] for contender in contenders}
    for number in range(1, rounds + 1):
        for contender in contenders:
            print(f"{name}, round {number} of {rounds}: {contender}", flush=True)
            runs[contender].append(run_contender(contender, task, folder / f"{contender}-{number}.json"))
    (folder / "machine.json").write_text(json.dumps(asdict(machine), indent=1) + "\n")
    write_results(f"{name} on {'a GPU' if task.device == 'cuda' else 'a CPU'}", runs, machine, folder)


def run_contender(contender: str, task: Task, output: Path) -> Measurement:
    """Run a contender in a separate process."""
    steps = STEPS[task.device][contender]
    arguments = ["--task", task.to_json(), "--steps", str(steps), "--every", str(max(steps // EVALUATIONS, 1))]
    module, *switches = CONTENDERS[contender]
    command = [sys.executable, "-W", "ignore", "-m", module, *switches, *arguments, "--output", str(output)]
    log = output.with_suffix(".log")
    with log.open("w") as stream:
        done = subprocess.run(command, stdout=stream, stderr=stream, env=_environment(), check=False)
    if done.returncode != 0:
        raise SystemExit(f"{contender} failed:\n{log.read_text()[-3000:]}")
    log.unlink()
    return Measurement.read(output)


def _environment() -> dict[str, str]:
    """Return this process's environment without settings of how OpenMP threads wait, and offline."""
    return {name: value for name, value in os.environ.items() if name not in {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}} | {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def write_results(title: str, runs: Runs, machine: Machine, folder: Path) -> None:
    """Write the page and the plot, and print the page."""
    page = write_page(title, runs, machine)
    folder.with_name(f"{folder.name}.md").write_text(page)
    draw(title, runs, folder.with_name(f"{folder.name}.png"))
    print(page)


if __name__ == "__main__":
    sys.exit(main())
