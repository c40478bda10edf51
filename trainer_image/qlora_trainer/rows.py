"""Rows of a dataset: read, checked one by one, and split; knows neither tokens nor models."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

from qlora_api.names import Reason
from qlora_trainer.errors import RunError
from qlora_trainer.store import Owner

RowFormat: TypeAlias = Literal["instruction", "completion"]

SHOWN_PROBLEMS: Final = 5
"""Broken rows that a message lists; the others are counted."""
_ANSWER_FIELDS: Final = ("output", "response")


@dataclass(frozen=True)
class Example:
    """A prompt as the model sees it, and the answer it should give."""

    prompt: str
    answer: str

    @property
    def digest(self) -> str:
        """Return the SHA-256 of the content; equal rows have equal digests."""
        return hashlib.sha256(json.dumps([self.prompt, self.answer]).encode()).hexdigest()


class RowError(ValueError):
    """One row cannot be used; the message is the reason."""


def load_examples(path: Path, owner: Owner, wanted: str, limit: int | None) -> tuple[RowFormat, list[Example]]:
    """Read the first rows of a file, and refuse the file when any of them is broken."""
    try:
        rows = list(islice(_raw_rows(path), limit))
    except FileNotFoundError as error:
        raise RunError(Reason.DATASET_NOT_FOUND, f"{owner.field}: there is no file {path}; correct the URI") from error
    if not rows:
        raise RunError(Reason.DATASET_EMPTY, f"{owner.field}: the file has no rows; add rows")
    row_format = _tell_format(rows, owner) if wanted == "auto" else _as_format(wanted)
    return row_format, _checked(rows, row_format, owner)


def _raw_rows(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the number of each line, from 1, and its content; blank lines are skipped but counted."""
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            content = line.removeprefix(b"\xef\xbb\xbf").strip()
            if content:
                yield number, content


def _checked(rows: Sequence[tuple[int, bytes]], row_format: RowFormat, owner: Owner) -> list[Example]:
    examples, problems = [], []
    for number, content in rows:
        try:
            examples.append(to_example(parse_row(content), row_format))
        except RowError as error:
            problems.append(f"row {number}: {error}")
    if problems:
        shown = "; ".join(problems[:SHOWN_PROBLEMS])
        more = f"; and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
        raise RunError(
            Reason.DATASET_INVALID,
            f"{owner.field}: {len(problems)} of {len(rows)} rows cannot be used as {row_format} rows. {shown}{more}",
        )
    return examples


def parse_row(content: bytes) -> Mapping[str, Any]:
    """Turn a line into an object, or raise RowError."""
    try:
        row = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RowError(f"byte {error.start + 1} is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise RowError(f"broken JSON at column {error.colno}: {error.msg}") from error
    except RecursionError as error:
        raise RowError("the JSON is nested too deeply") from error
    if not isinstance(row, dict):
        raise RowError(f"is a JSON {type(row).__name__}, not an object")
    return row


def _as_format(name: str) -> RowFormat:
    return "completion" if name == "completion" else "instruction"


def _tell_format(rows: Sequence[tuple[int, bytes]], owner: Owner) -> RowFormat:
    """Tell the format by the fields of the first row that is an object at all."""
    for number, content in rows:
        try:
            fields = parse_row(content).keys()
        except RowError:
            continue
        if "instruction" in fields:
            return "instruction"
        if "prompt" in fields:
            return "completion"
        raise RunError(
            Reason.DATASET_INVALID,
            f"{owner.field}: row {number} has the fields {', '.join(sorted(fields)) or '(none)'}; write "
            "instruction and output (or response), or prompt and completion",
        )
    return "instruction"


def to_example(row: Mapping[str, Any], row_format: RowFormat) -> Example:
    """Render one row, or raise RowError with the field at fault."""
    if row_format == "completion":
        return Example(_text(row, "prompt"), _text(row, "completion"))
    answers = [name for name in _ANSWER_FIELDS if name in row]
    if len(answers) == 2:
        raise RowError("has both 'output' and 'response'; keep one")
    instruction = _text(row, "instruction")
    if not answers:
        raise RowError("field 'response' (or 'output') is missing")
    return Example(render_instruction(instruction, _optional_text(row, "input")), _text(row, answers[0]))


def render_instruction(instruction: str, context: str = "") -> str:
    """Return the prompt of an instruction row."""
    block = f"### Input:\n{context}\n\n" if context else ""
    return f"### Instruction:\n{instruction}\n\n{block}### Response:\n"


def _text(row: Mapping[str, Any], name: str) -> str:
    if name not in row:
        raise RowError(f"field '{name}' is missing")
    value = row[name]
    if not isinstance(value, str):
        raise RowError(f"field '{name}' is a JSON {type(value).__name__}, not a string")
    if not value.strip():
        raise RowError(f"field '{name}' is empty")
    return value


def _optional_text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RowError(f"field '{name}' is a JSON {type(value).__name__}, not a string")
    return value.strip() and value


def split(examples: Sequence[Example], fraction: float, owner: Owner) -> tuple[list[Example], list[Example]]:
    """Hold out the share of distinct rows with the lowest hashes, at least one; copies of a row stay together."""
    distinct = sorted({example.digest for example in examples})
    if len(distinct) < 2:
        raise RunError(
            Reason.DATASET_EMPTY,
            f"{owner.field}: {len(distinct)} distinct row cannot be both trained and evaluated on; add rows, or set "
            "spec.dataset.evaluation.uri",
        )
    count = min(max(round(fraction * len(distinct)), 1), len(distinct) - 1)
    held_out = frozenset(distinct[:count])
    return (
        [example for example in examples if example.digest not in held_out],
        [example for example in examples if example.digest in held_out],
    )


def without(examples: Sequence[Example], held_out: Iterable[Example], owner: Owner) -> list[Example]:
    """Return the rows that are not held out: nobody is examined on what was rehearsed."""
    seen = {example.digest for example in held_out}
    kept = [example for example in examples if example.digest not in seen]
    if not kept:
        raise RunError(
            Reason.DATASET_EMPTY, f"{owner.field}: every row is in spec.dataset.evaluation.uri as well; add rows"
        )
    return kept


def digest_of(training: Iterable[Example], held_out: Iterable[Example]) -> str:
    """Return the SHA-256 over all rows in use, in order, and over the side that each is on."""
    digest = hashlib.sha256()
    for side, examples in (("training", training), ("evaluation", held_out)):
        for example in examples:
            digest.update(f"{side} {example.digest}\n".encode())
    return digest.hexdigest()
