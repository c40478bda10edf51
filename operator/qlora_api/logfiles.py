"""Where a process's log lies in the output, for those who write it and those who look for it."""

import re
from dataclasses import dataclass
from typing import Final, Self

PREPARE_ATTEMPT: Final = 0
"""The number of the preparation among the attempts, which count from 1."""
_FOLDER: Final = "logs"
_PREPARE: Final = "prepare.jsonl"
_LOG_NAME: Final = re.compile(r"attempt-(?P<attempt>\d+)-node-(?P<node>\d+)(-rank-(?P<rank>\d+))?\.jsonl")


def log_folder(uid: str) -> str:
    """Return the folder of a QLoRAJob's logs, beside its results: several may work on one result, and have one name."""
    return f"{_FOLDER}/{uid}" if uid else _FOLDER


@dataclass(frozen=True)
class LogFile:
    """The log of one process, as an object of its own."""

    attempt: int
    """PREPARATION, or the training attempt."""
    node: int = 0
    """The pod's place among those of the attempt."""
    rank: int | None = None
    """The process among those of the run; none for the preparation, and for the one that starts a pod's others."""

    @property
    def name(self) -> str:
        """Return the object's name."""
        if self.attempt == PREPARE_ATTEMPT:
            return _PREPARE
        process = "" if self.rank is None else f"-rank-{self.rank}"
        return f"attempt-{self.attempt}-node-{self.node}{process}.jsonl"

    @classmethod
    def parse(cls, name: str) -> Self | None:
        """Return whose log a name stands for; None where it is none of ours."""
        if name == _PREPARE:
            return cls(PREPARE_ATTEMPT)
        if not (match := _LOG_NAME.fullmatch(name)):
            return None
        rank = match["rank"]
        return cls(int(match["attempt"]), int(match["node"]), int(rank) if rank else None)
