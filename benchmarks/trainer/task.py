"""The task of all contenders: model, rows, and the settings of the tutorial recipe."""

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Literal

from examples.quickstart.make_data import DATA, HELD_OUT, TRAIN

Device = Literal["cpu", "cuda"]

RANK: Final = 16
ALPHA: Final = 32
DROPOUT: Final = 0.05
TARGETS: Final = ("q_proj", "v_proj")
LEARNING_RATE: Final = 2e-4
BATCH: Final = 4
ACCUMULATION: Final = 4
GLOBAL_BATCH: Final = BATCH * ACCUMULATION
SEED: Final = 42
_PROMPT: Final = "### Instruction:\n{}\n\n### Response:\n"
_LONG_ROW: Final = 24
"""Most answers concatenated into a long row: rows of 20 to 700 tokens, as in instruction datasets."""


@dataclass(frozen=True)
class Task:
    """One comparison."""

    model: str
    """Folder of the model."""
    device: Device
    max_length: int
    """Tokens to which the recipe pads; no row is longer."""
    long_rows: bool = False
    evaluation_rows: int = 48
    """Held-out rows to evaluate; 0 for a random model, whose loss has no meaning."""

    def to_json(self) -> str:
        """Return the task for another process."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "Task":
        """Read a task that another process wrote."""
        return Task(**json.loads(text))


@dataclass(frozen=True)
class Pair:
    """A prompt in the usual template, and its answer."""

    prompt: str
    answer: str


def training_pairs(task: Task) -> list[Pair]:
    """Return the training rows, in the order of the file."""
    pairs = _read(DATA / TRAIN)
    return _lengthen(pairs) if task.long_rows else pairs


def held_out_pairs(task: Task) -> list[Pair]:
    """Return the rows to evaluate on."""
    return _read(DATA / HELD_OUT)[: task.evaluation_rows]


def _read(path: Path) -> list[Pair]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [Pair(_PROMPT.format(row["instruction"]), row["response"]) for row in rows]


def _lengthen(pairs: list[Pair]) -> list[Pair]:
    """Append to each row the answers of the next rows, up to _LONG_ROW answers in all, uniformly distributed."""
    generator = random.Random(SEED)  # noqa: S311 (no secret)
    return [
        Pair(pair.prompt, " ".join(other.answer for other in pairs[number : number + generator.randint(1, _LONG_ROW)]))
        for number, pair in enumerate(pairs)
    ]


def write_pairs(pairs: list[Pair], path: Path) -> None:
    """Write rows in the format of our trainer."""
    path.write_text("".join(f"{json.dumps({'prompt': pair.prompt, 'completion': pair.answer})}\n" for pair in pairs))
