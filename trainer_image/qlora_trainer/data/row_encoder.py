"""Rows to token rows, a batch at a time: each format's way, and what happens to rows that are too long."""

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final, NamedTuple, TypeVar, cast

from qlora_api.names import Reason
from qlora_api.v1alpha1 import RowFormat, TrainingSpec
from qlora_trainer.data.chat_template import ChatTemplate, encode_chats
from qlora_trainer.data.rows import Chat, Example, Row, RowError, Text
from qlora_trainer.data.sources import Problems, Source
from qlora_trainer.data.tokenization import TokenRow, encode_examples, encode_texts
from qlora_trainer.errors import RunError

BATCH_ROWS: Final = 1000
"""Rows per call of the tokenizer; more saves no time, and fewer keep less in memory."""

Item = TypeVar("Item")


class EncodedRow(NamedTuple):
    """A token row, where it came from, and the hash that decides which side it is on."""

    place: str
    digest: bytes
    row: TokenRow


@dataclass(frozen=True)
class Encoder:
    """One tokenizer, one chat template, and one choice of what is learned."""

    tokenizer: Any
    loss: str
    chat: ChatTemplate | None
    """None where there are no chats."""

    def rows(self, source: Source, asked: Callable[[bytes], bool]) -> Iterator[EncodedRow]:
        """Yield the token rows of a source; when they are through, refuse what its chat template refused.

        `asked` tells by a row's hash whether it is held out, so that its prompt is needed.
        """
        problems = Problems()
        for batch in batched(source.rows(), BATCH_ROWS):
            encoded = self._encode([placed.row for placed in batch], source.row_format, asked)
            for placed, row in zip(batch, encoded, strict=True):
                if isinstance(row, RowError):
                    problems.add(placed.place, row)
                else:
                    yield EncodedRow(placed.place, placed.row.digest, row)
        if problems.total:
            raise RunError(Reason.DATASET_INVALID, f"{source.owner.field}: {problems}")

    def _encode(
        self, rows: Sequence[Row], row_format: RowFormat, asked: Callable[[bytes], bool]
    ) -> Sequence[TokenRow | RowError]:
        if row_format == "chat" and self.chat is not None:
            chats = cast("Sequence[Chat]", rows)
            return encode_chats(chats, self.chat, self.loss, [asked(row.digest) for row in chats])
        if row_format == "text":
            return encode_texts(cast("Sequence[Text]", rows), self.tokenizer)
        return encode_examples(cast("Sequence[Example]", rows), self.tokenizer, self.loss)


@dataclass
class Tally:
    """What became of the rows of one side."""

    rows: int = 0
    tokens: int = 0
    truncated: int = 0
    dropped: int = 0
    lengths: "array[int]" = field(default_factory=lambda: array("I"))
    """Tokens of each row before any cut."""


@dataclass(frozen=True)
class Ruler:
    """The longest that a row may be, and what happens to longer ones."""

    limit: int
    policy: str
    refused: Problems = field(default_factory=Problems)

    def fit(self, encoded: EncodedRow, tally: Tally, times: int = 1) -> TokenRow | None:
        """Return the row as it is used, or None where it is left out; count what happened, as often as it is seen."""
        length = len(encoded.row.input_ids)
        too_long = length > self.limit
        if too_long and self.policy == "refuse":
            self.refused.add(encoded.place, f"{length} tokens")
        row = encoded.row.cut(self.limit)
        dropped = (too_long and self.policy == "drop") or row.label_count == 0
        tally.lengths.extend([length] * times)
        tally.dropped += times * dropped
        tally.truncated += times * (too_long and not dropped)
        if dropped:
            return None
        tally.rows += times
        tally.tokens += times * len(row.input_ids)
        return row

    def check(self) -> None:
        """Refuse the rows that were too long, if that is what was asked for."""
        if self.refused.total:
            raise RunError(
                Reason.DATASET_INVALID,
                f"spec.training.longRows: {self.refused.total} rows have more than maxLength {self.limit} tokens "
                f"({self.refused}); shorten them, raise spec.training.maxLength, or set longRows to truncate or drop",
            )


def make_ruler(training: TrainingSpec) -> Ruler:
    """Return the ruler that the manifest asks for."""
    return Ruler(training.max_length, training.long_rows)


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yield lists of at most `size` items."""
    stream = iter(items)
    while batch := list(islice(stream, size)):
        yield batch
