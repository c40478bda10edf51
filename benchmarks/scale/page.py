"""The results as a page."""

from collections.abc import Iterator, Mapping
from typing import Final

from benchmarks.scale.results import Results
from benchmarks.scale.trial import IDLE_SECONDS, FirstChildren, without_lease
from benchmarks.trainer.machine import Machine
from tests.cluster.binaries import KUBERNETES_VERSION

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
            f"- {machine.processor}, {machine.cores} cores, {machine.memory_gib} GiB",
            f"- {machine.system}; Kubernetes {KUBERNETES_VERSION}, "
            + ", ".join(f"{name} {version}" for name, version in machine.libraries.items()),
            f"- load before the start: {machine.load}",
            "",
        ]
    )


def _first_children(results: Results) -> Iterator[str]:
    ours, theirs = results.ours, results.jobset
    yield "| the first Job of every object | Jobs/s | CPU time of the controller | peak memory | writes per object |"
    yield "|---|---|---|---|---|"
    yield _row("qlora-operator", ours, results.jobs)
    yield _row(JOBSET, theirs, results.jobs)
    yield (
        f"| ours to theirs | {theirs.seconds / ours.seconds:.2f} x | "
        f"{ours.usage.cpu_seconds / theirs.usage.cpu_seconds:.2f} x | "
        f"{ours.usage.peak_mib / theirs.usage.peak_mib:.2f} x | |"
    )


def _row(name: str, measured: FirstChildren, jobs: int) -> str:
    return (
        f"| {name} | {jobs / measured.seconds:.1f} | {measured.usage.cpu_seconds:.0f} s | "
        f"{measured.usage.peak_mib:.0f} MiB | {without_lease(measured.writes) / jobs:.2f} |"
    )


def _promises(results: Results) -> Iterator[str]:
    restart, lives = results.restart, results.whole_lives
    idle = without_lease(restart.idle_writes) * MINUTE / IDLE_SECONDS
    yield "| promise | bound | measured |"
    yield "|---|---|---|"
    yield f"| writes from a QLoRAJob to its first child | 4 | {without_lease(results.ours.writes) / results.jobs:.2f} |"
    peak = max(results.ours.usage.peak_mib, restart.peak_mib, lives.usage.peak_mib)
    yield f"| peak resident memory of the operator, whatever it did | 256 MiB | {peak:.0f} MiB |"
    yield f"| restart with {results.jobs} present, to the last look | 30 s | {restart.seconds:.1f} s |"
    yield f"| writes of a restart where nothing has changed | 0 | {without_lease(restart.writes)} |"
    yield f"| writes a minute with nothing to do | 1 | {idle:.1f} |"
    yield f"| a finished QLoRAJob | 10,240 bytes | {lives.largest_bytes:,} bytes |"
    yield (
        f"| {results.lives} lives from creation to publication, pods of one second | all, two Jobs each | "
        f"all in {lives.seconds:.0f} s: {results.lives / lives.seconds:.1f}/s, "
        f"{without_lease(lives.writes) / results.lives:.2f} writes each, {lives.usage.peak_mib:.0f} MiB |"
    )


def _writes(results: Results) -> Iterator[str]:
    yield "Writes, by the API server's record; the Lease of the leader election is renewed whatever there is to do."
    yield ""
    yield f"- first Jobs, ours: {_list(results.ours.writes)}"
    yield f"- first Jobs, {JOBSET}: {_list(results.jobset.writes)}"
    yield f"- lives: {_list(results.whole_lives.writes)}"
    yield f"- restart: {_list(results.restart.writes)}; {IDLE_SECONDS} s idle: {_list(results.restart.idle_writes)}"


def _list(writes: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {what}" for what, number in writes.items()) or "none"
