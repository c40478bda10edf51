"""Names of the log files in a run's output, for the trainer that uploads them and the CLI that downloads them."""

import re
from dataclasses import dataclass
from typing import Final, Self

PREPARE_ATTEMPT: Final = 0
"""Attempt number that stands for preparation; training attempts count from 1."""
_FOLDER: Final = "logs"
_PREPARE: Final = "prepare.jsonl"
_LOG_NAME: Final = re.compile(r"attempt-(?P<attempt>\d+)-node-(?P<node>\d+)(-rank-(?P<rank>\d+))?\.jsonl")


def log_folder(uid: str) -> str:
    """Return the folder of a QLoRAJob's logs.

    It is next to the results and not in one, and has the uid in its path, because several QLoRAJobs can have the same
    name and the same result.

    Args:
        uid: Uid of the QLoRAJob; empty without a cluster.

    """
    return f"{_FOLDER}/{uid}" if uid else _FOLDER


@dataclass(frozen=True)
class LogFile:
    """The log of one process: one object in the output."""

    attempt: int
    """PREPARE_ATTEMPT, or the number of a training attempt."""
    node: int = 0
    """The pod's index in the attempt."""
    rank: int | None = None
    """The process's rank in the run; None for preparation, and for a pod's launcher process."""

    @property
    def name(self) -> str:
        """Return the object's name."""
        if self.attempt == PREPARE_ATTEMPT:
            return _PREPARE
        process = "" if self.rank is None else f"-rank-{self.rank}"
        return f"attempt-{self.attempt}-node-{self.node}{process}.jsonl"

    @classmethod
    def parse(cls, name: str) -> Self | None:
        """Return the log file of an object's name, or None if it is not a log file."""
        if name == _PREPARE:
            return cls(PREPARE_ATTEMPT)
        if not (match := _LOG_NAME.fullmatch(name)):
            return None
        rank = match["rank"]
        return cls(int(match["attempt"]), int(match["node"]), int(rank) if rank else None)
