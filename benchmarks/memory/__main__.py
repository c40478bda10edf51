"""`make bench-memory`: measure all combinations, and write table, plot and raw results."""

import argparse
import gc
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

from transformers.utils import logging

from benchmarks.memory.combinations import CHOSEN, Combination, draw
from benchmarks.memory.comparison import Comparison, errors
from benchmarks.memory.measure import measure
from benchmarks.memory.page import Samples, draw_picture, write_page
from benchmarks.memory.predict import predict
from benchmarks.memory.published import write_published
from benchmarks.trainer.machine import observe_machine

RESULTS: Final = Path(__file__).parents[1] / "results"
DRAWN: Final = 12
SEED: Final = 5
"""Seed of the drawn combinations, which were not used while the formula was written; change it for others."""


def main() -> int:
    """Measure, write the results, and return 1 if a prediction is off by more than the bounds."""
    options = _parse()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    started, machine = time.monotonic(), observe_machine()
    samples = {
        "chosen": _compare(CHOSEN),
        f"drawn with seed {options.seed}": _compare(draw(DRAWN, options.seed)),
    }
    page = write_page(samples, machine, time.monotonic() - started)
    RESULTS.joinpath("memory-cpu.md").write_text(page)
    RESULTS.joinpath("memory-cpu.json").write_text(json.dumps(_raw(samples), indent=1) + "\n")
    RESULTS.joinpath("memory-published.md").write_text(write_published())
    draw_picture(samples, RESULTS / "memory-cpu.png")
    found = [errors([each.step_error for each in comparisons]) for comparisons in samples.values()]
    return 0 if all(each.holds for each in found) else 1


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--seed", type=int, default=SEED, help="seed of the drawn combinations")
    return parser.parse_args()


def _compare(combinations: Sequence[Combination]) -> list[Comparison]:
    made = []
    for combination in combinations:
        made.append(Comparison(combination, measure(combination), predict(combination)))
        print(f"{made[-1].step_error:+7.2%}  {combination.model}  {combination.layout}  {combination.training}")
        gc.collect()
    return made


def _raw(samples: Samples) -> list[dict[str, object]]:
    return [
        {"sample": name, "combination": each.combination.changes()}
        | {"measured": asdict(each.measured), "predicted": asdict(each.predicted)}
        for name, comparisons in samples.items()
        for each in comparisons
    ]


if __name__ == "__main__":
    sys.exit(main())
