"""The command line of a contender."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from benchmarks.trainer.task import Task


@dataclass(frozen=True)
class Order:
    """What a contender is told."""

    task: Task
    steps: int
    every: int
    """Steps between two examinations."""
    output: Path


def read_order() -> Order:
    """Read the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--task", required=True, help="Task.to_json()")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--every", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    return Order(Task.from_json(options.task), options.steps, options.every, options.output)
