"""The results of one run of the benchmark."""

from dataclasses import dataclass

from benchmarks.scale.trial import CompletedRuns, FirstChildren, Restart


@dataclass(frozen=True)
class Results:
    """All measurements."""

    jobs: int
    runs: int
    ours: FirstChildren
    jobset: FirstChildren
    restart: Restart
    completed_runs: CompletedRuns
