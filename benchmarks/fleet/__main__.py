"""Runs on a simulated fleet with broken nodes, in virtual time: how they end, and the GPU time that is lost.

`python -m benchmarks.fleet` prints the page and writes benchmarks/results/fleet.md; it needs nothing but Python.
"""

import argparse
import asyncio
import logging
import time
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Final

from tests.fleet.fleet import CHECKPOINT_INTERVAL, Fleet, submit_mixed_runs
from tests.fleet.nodes import Fault
from tests.make import NOW

PAGE: Final = Path(__file__).parents[1] / "results/fleet.md"
HOUR: Final = 3600


def main() -> None:
    """Simulate, print and write the page."""
    parser = argparse.ArgumentParser(prog="benchmarks.fleet", description=__doc__)
    parser.add_argument("--nodes", type=int, default=40)
    parser.add_argument("--broken-per-fault", type=int, default=2)
    parser.add_argument("--singles", type=int, default=184, help="runs with two GPUs")
    parser.add_argument("--gangs", type=int, default=16, help="runs with four GPUs on each of four nodes")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    fleet = Fleet(options.nodes, options.broken_per_fault, options.seed)
    submit_mixed_runs(fleet, options.singles, options.gangs)
    start = time.monotonic()
    asyncio.run(fleet.run_all())
    page = "\n".join(describe(fleet, options.singles, options.gangs, time.monotonic() - start))
    PAGE.write_text(f"{page}\n", encoding="utf-8")
    print(page)


def describe(fleet: Fleet, singles: int, gangs: int, seconds: float) -> Iterator[str]:
    """Yield the lines of the page."""
    broken = sum(node.fault is not None for node in fleet.nodes)
    ends = Counter(f"{run.phase} ({run.cluster.status['reason']})" for run in fleet.runs)
    yield "# Broken nodes"
    yield ""
    yield f"`make bench-fleet`: {len(fleet.nodes)} simulated nodes with 8 GPUs, {broken} of them broken all the time,"
    yield f"and {singles} runs of 2 GPUs and {gangs} of 4 nodes with 4 GPUs, one a minute, of 1 to 3 hours."
    yield f"Checkpoints are {CHECKPOINT_INTERVAL.seconds // 60} minutes apart. Decisions and quarantine are those of"
    yield "the operator; API server, Job controller, scheduler (emptiest node first) and kubelets are those of its"
    yield "tests, in virtual time (`tests/fleet`)."
    yield ""
    yield f"- how the runs ended: {', '.join(f'{number} {end}' for end, number in ends.most_common())}"
    yield f"- {fleet.useful / HOUR:,.0f} useful GPU-hours in {(fleet.now - NOW) / timedelta(hours=1):.1f} hours"
    yield f"- {fleet.passes} reconciles, in {seconds:.0f} s of real time"
    yield ""
    yield "| two nodes each | attempts that they ended | GPU-hours lost | share of the useful |"
    yield "|---|---|---|---|"
    for fault in Fault:
        yield _row(fault, fleet.attempts[fault], fleet.lost[fault], fleet.useful)
    yield _row(
        "**all broken nodes**", sum(fleet.attempts[f] for f in Fault), sum(fleet.lost[f] for f in Fault), fleet.useful
    )
    yield _row("start, end, and waiting for the others of a gang", fleet.attempts[None], fleet.lost[None], fleet.useful)


def _row(name: str, attempts: int, lost: float, useful: float) -> str:
    return f"| {name} | {attempts} | {lost / HOUR:.1f} | {lost / useful:.1%} |"


if __name__ == "__main__":
    main()
