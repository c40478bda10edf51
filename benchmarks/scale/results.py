"""One run of the benchmark, as it is written down."""

from dataclasses import dataclass

from benchmarks.scale.trial import CompletedRuns, FirstChildren, Restart


@dataclass(frozen=True)
class Results:
    """Everything that was measured."""

    jobs: int
    lives: int
    ours: FirstChildren
    jobset: FirstChildren
    restart: Restart
    whole_lives: CompletedRuns
