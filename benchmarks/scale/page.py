"""The results as a page."""

from collections.abc import Iterator, Mapping
from typing import Final

from benchmarks.scale.results import Results
from benchmarks.scale.trial import IDLE_SECONDS, FirstChildren, without_lease
from benchmarks.trainer.machine import Machine
from tests.cluster.programs.binaries import KUBERNETES_VERSION

JOBSET: Final = "JobSet v0.10.1"
MINUTE: Final = 60


def write_page(results: Results, machine: Machine) -> str:
    """Return the page in Markdown."""
    return "\n".join(
        [
            "# Ten thousand QLoRAJobs" if results.jobs == 10_000 else f"# {results.jobs} QLoRAJobs",
            "",
            "All on one machine: etcd, API server, controllers, simulated nodes. [How](../scale/README.md).",
            "",
            *_first_children(results),
            "",
            *_promises(results),
            "",
            *_writes(results),
            "",
            *describe_machine(machine),
            "",
        ]
    )


def describe_machine(machine: Machine) -> Iterator[str]:
    """Yield what a measurement ran on."""
    libraries = ", ".join(f"{name} {version}" for name, version in machine.libraries.items())
    yield f"- {machine.processor}, {machine.cores} cores, {machine.memory_gib} GiB"
    yield f"- {machine.system}; Kubernetes {KUBERNETES_VERSION}, {libraries}"
    yield f"- load before the start: {machine.load}"


def _first_children(results: Results) -> Iterator[str]:
    ours, theirs = results.ours, results.jobset
    yield "| the first Job of every object | Jobs/s | CPU time of the controller | peak memory | writes per object |"
    yield "|---|---|---|---|---|"
    yield _row("qlora-operator", ours, results.jobs)
    yield _row(JOBSET, theirs, results.jobs)
    yield (
        f"| ours vs. JobSet | {theirs.seconds / ours.seconds:.2f} x | "
        f"{ours.usage.cpu_seconds / theirs.usage.cpu_seconds:.2f} x | "
        f"{ours.usage.peak_mib / theirs.usage.peak_mib:.2f} x | |"
    )


def _row(name: str, measured: FirstChildren, jobs: int) -> str:
    return (
        f"| {name} | {jobs / measured.seconds:.1f} | {measured.usage.cpu_seconds:.0f} s | "
        f"{measured.usage.peak_mib:.0f} MiB | {without_lease(measured.writes) / jobs:.2f} |"
    )


def _promises(results: Results) -> Iterator[str]:
    restart, completed = results.restart, results.completed_runs
    idle = without_lease(restart.idle_writes) * MINUTE / IDLE_SECONDS
    yield "| promise | bound | measured |"
    yield "|---|---|---|"
    yield f"| writes from a QLoRAJob to its first child | 4 | {without_lease(results.ours.writes) / results.jobs:.2f} |"
    peak = max(results.ours.usage.peak_mib, restart.peak_mib, completed.usage.peak_mib)
    yield f"| peak resident memory of the operator | 256 MiB | {peak:.0f} MiB |"
    yield f"| restart with {results.jobs} QLoRAJobs, until all are reconciled | 30 s | {restart.seconds:.1f} s |"
    yield f"| writes of a restart without changes | 0 | {without_lease(restart.writes)} |"
    yield f"| writes per minute when idle | 1 | {idle:.1f} |"
    yield f"| a finished QLoRAJob | 10,240 bytes | {completed.largest_bytes:,} bytes |"
    yield (
        f"| {results.runs} runs from creation to publication, with pods of one second | all, two Jobs each | "
        f"all in {completed.seconds:.0f} s: {results.runs / completed.seconds:.1f}/s, "
        f"{without_lease(completed.writes) / results.runs:.2f} writes each, {completed.usage.peak_mib:.0f} MiB |"
    )


def _writes(results: Results) -> Iterator[str]:
    yield "Writes, from the API server's audit log; the Lease of the leader election is renewed at any load."
    yield ""
    yield f"- first Jobs, ours: {_list(results.ours.writes)}"
    yield f"- first Jobs, {JOBSET}: {_list(results.jobset.writes)}"
    yield f"- complete runs: {_list(results.completed_runs.writes)}"
    yield f"- restart: {_list(results.restart.writes)}; {IDLE_SECONDS} s idle: {_list(results.restart.idle_writes)}"


def _list(writes: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {write}" for write, number in writes.items()) or "none"
