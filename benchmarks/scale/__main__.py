"""`make bench-scale`: both contenders in turn, each on its own control plane, then the page."""

import argparse
import asyncio
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Final

from benchmarks.scale.audit import Audit
from benchmarks.scale.page import describe_machine, write_page
from benchmarks.scale.reporting import Reporting, describe_reporting, measure_reporting
from benchmarks.scale.results import Results
from benchmarks.scale.trial import (
    CompletedRuns,
    FirstChildren,
    Restart,
    connect,
    create,
    measure_completed_runs,
    measure_first_children,
    measure_restart,
    wait_for_quiet,
)
from benchmarks.scale.workload import (
    JOBSETS,
    NAMESPACE,
    QLORAJOBS,
    build_ends,
    build_jobset,
    build_prepare_end,
    build_qlorajob,
)
from benchmarks.trainer.machine import Machine, observe_machine
from tests.cluster.cluster import Cluster
from tests.cluster.controllers import install_jobset
from tests.cluster.services.kwok import pods_that_run
from tests.integration.operator_process import ACCOUNT, OPERATOR_NAMESPACE, Operator, install

RESULTS: Final = Path(__file__).parents[1] / "results"
NODES: Final = 100
"""Simulated nodes with GPUS_PER_NODE GPUs each."""
GPUS_PER_NODE: Final = 8
LIBRARIES: Final = ("kopf", "kubernetes", "pydantic", "aiohttp")
ACCOUNTS: Final = (f"{OPERATOR_NAMESPACE}:{ACCOUNT}", "jobset-system:jobset")


def main() -> int:
    """Run the benchmark and write its results."""
    options = parse()
    machine = observe_machine(LIBRARIES)
    if options.reporting:
        return report(options, machine)
    results = asyncio.run(measure(options.jobs, options.runs))
    page = write_page(results, machine)
    _, heading, reporting = RESULTS.joinpath("scale.md").read_text().partition("\n## ")
    RESULTS.joinpath("scale.md").write_text(f"{page}{heading}{reporting}")
    RESULTS.joinpath("scale.json").write_text(json.dumps(asdict(results), indent=1) + "\n")
    print(page)
    return 0


def report(options: argparse.Namespace, machine: Machine) -> int:
    """Measure runs that report, and replace their section of the page."""
    measured = asyncio.run(measure_reports(options.reporting, options.finished, options.seconds))
    page = RESULTS / "scale.md"
    rest = page.read_text().partition("\n## ")[0].rstrip()
    section = "\n".join(describe_reporting(measured, describe_machine(machine)))
    page.write_text(f"{rest}\n\n{section}\n")
    print(section)
    return 0


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.scale", description=__doc__)
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--runs", type=int, default=2_000)
    parser.add_argument("--reporting", type=int, default=0, help="measure only so many runs that report")
    parser.add_argument("--finished", type=int, default=10_000, help="beside so many that have finished")
    parser.add_argument("--seconds", type=float, default=120.0, help="for so long")
    return parser.parse_args()


async def measure(jobs: int, runs: int) -> Results:
    """Measure both contenders, and then the promises of the operator alone."""
    jobset = await measure_jobset(jobs)
    ours, restart = await measure_operator(jobs)
    return Results(jobs, runs, ours, jobset, restart, await measure_simulation(runs))


async def measure_jobset(jobs: int) -> FirstChildren:
    """Measure JobSet creating the Jobs of existing JobSets."""
    print(f"JobSet and {jobs} JobSets", flush=True)
    with open_cluster(pods_that_run()) as (cluster, audit):
        controller = install_jobset(cluster)
        async with connect(cluster) as api:
            await create(api, JOBSETS, build_jobset, jobs)
            return await measure_first_children(api, controller, audit, jobs)


async def measure_operator(jobs: int) -> tuple[FirstChildren, Restart]:
    """Measure the operator creating the first Jobs of existing QLoRAJobs, and its restart after that."""
    print(f"the operator and {jobs} QLoRAJobs", flush=True)
    with open_cluster(pods_that_run()) as (cluster, audit), install_operator(cluster, audit) as operator:
        async with connect(cluster) as api:
            await create(api, QLORAJOBS, build_qlorajob, jobs)
            first = await measure_first_children(api, operator, audit, jobs)
            await wait_for_quiet(api, audit)
        operator.terminate()
        return first, await measure_restart(operator, audit, jobs)


async def measure_simulation(runs: int) -> CompletedRuns:
    """Measure runs from creation to publication."""
    print(f"{runs} QLoRAJobs from creation to publication", flush=True)
    stages = "\n---\n".join((pods_that_run(), build_ends()))
    with open_cluster(stages) as (cluster, audit), install_operator(cluster, audit) as operator:
        operator.start()
        async with connect(cluster) as api:
            return await measure_completed_runs(api, operator, audit, build_qlorajob, runs)


async def measure_reports(runs: int, finished: int, seconds: float) -> Reporting:
    """Measure the operator while runs report."""
    print(f"{runs} QLoRAJobs that report beside {finished} that have finished", flush=True)
    stages = "\n---\n".join((pods_that_run(), build_prepare_end()))
    nodes = max(NODES, math.ceil(runs / GPUS_PER_NODE))
    with open_cluster(stages, nodes) as (cluster, audit), install_operator(cluster, audit) as operator:
        async with connect(cluster) as api:
            return await measure_reporting(api, operator, audit, build_qlorajob, runs, finished, seconds)


@contextmanager
def install_operator(cluster: Cluster, audit: Audit) -> Iterator[Operator]:
    """Install an operator to be started later, and stop it at the end of the block."""
    folder = audit.folder / "operator"
    folder.mkdir()
    operator = Operator(cluster, folder)
    try:
        yield operator
    finally:
        operator.stop()


@contextmanager
def open_cluster(stages: str, nodes: int = NODES) -> Iterator[tuple[Cluster, Audit]]:
    """Start a control plane with an audit log of writes, simulated GPU nodes and both CRDs."""
    with tempfile.TemporaryDirectory() as folder:
        audit = Audit(Path(folder))
        with Cluster.start(
            kwok_nodes=nodes, stages=stages, s3=False, api_server_flags=audit.flags(*ACCOUNTS)
        ) as cluster:
            install(cluster)
            cluster.kubectl("create", "namespace", NAMESPACE)
            yield cluster, audit


if __name__ == "__main__":
    sys.exit(main())
