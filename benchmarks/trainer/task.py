"""What all contenders do: the model, the rows, and the settings of the copied recipe."""

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
"""Answers that a long row joins at most: rows of 20 to 700 tokens, as instruction data sets have."""


@dataclass(frozen=True)
class Task:
    """One comparison."""

    model: str
    """Folder of the model."""
    device: Device
    max_length: int
    """Tokens to which the recipe pads and at which nothing is cut."""
    long_rows: bool = False
    evaluation_rows: int = 48
    """Held-out rows of which the loss is taken; 0 for a random model, whose loss says nothing."""

    def to_json(self) -> str:
        """Return the task for another process."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "Task":
        """Return the task that another process was given."""
        return Task(**json.loads(text))


@dataclass(frozen=True)
class Pair:
    """A prompt in the usual template, and its answer."""

    prompt: str
    answer: str


def training_pairs(task: Task) -> list[Pair]:
    """Return the rows to learn from, in the order of the file."""
    pairs = _read(DATA / TRAIN)
    return _lengthen(pairs) if task.long_rows else pairs


def held_out_pairs(task: Task) -> list[Pair]:
    """Return the rows that are examined."""
    return _read(DATA / HELD_OUT)[: task.evaluation_rows]


def _read(path: Path) -> list[Pair]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [Pair(_PROMPT.format(row["instruction"]), row["response"]) for row in rows]


def _lengthen(pairs: list[Pair]) -> list[Pair]:
    """Give each row the answers of some that follow it, from 1 to _LONG_ROW, evenly distributed."""
    chance = random.Random(SEED)  # noqa: S311 (no secret)
    return [
        Pair(pair.prompt, " ".join(other.answer for other in pairs[number : number + chance.randint(1, _LONG_ROW)]))
        for number, pair in enumerate(pairs)
    ]


def write_pairs(pairs: list[Pair], path: Path) -> None:
    """Write rows as our trainer reads them."""
    path.write_text("".join(f"{json.dumps({'prompt': pair.prompt, 'completion': pair.answer})}\n" for pair in pairs))
