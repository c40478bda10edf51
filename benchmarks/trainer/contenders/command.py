"""The command line of a contender."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from benchmarks.trainer.task import Task


@dataclass(frozen=True)
class ContenderOptions:
    """Options of a contender."""

    task: Task
    steps: int
    every: int
    """Steps between two evaluations."""
    output: Path


def parse_options() -> ContenderOptions:
    """Read the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--task", required=True, help="Task.to_json()")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--every", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    return ContenderOptions(Task.from_json(options.task), options.steps, options.every, options.output)
