"""Encodes rows as token rows in batches, and applies spec.training.longRows to rows that are too long."""

import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Final, NamedTuple, cast

from qlora_api.reasons import Reason
from qlora_api.v1alpha1 import RowFormat, TrainingSpec
from qlora_trainer.data.chat_template import ChatTemplate, encode_chats
from qlora_trainer.data.rows import MAX_TEXT_BYTES, Chat, Example, Row, RowError, Text
from qlora_trainer.data.sources import LocatedRow, RowErrors, Source
from qlora_trainer.data.tokenization import TokenRow, encode_examples, encode_texts, without_end_token
from qlora_trainer.errors import RunError

BATCH_ROWS: Final = 1000
"""Rows per call of the tokenizer: larger batches save no time and take more memory."""
_BATCH_BYTES: Final = MAX_TEXT_BYTES
"""Text per call of the tokenizer, unless a single row has more."""


_NO_TOKENS: Final = TokenRow((), ())


class EncodedRow(NamedTuple):
    """A token row, its location in the source, and the content hash that decides on its split."""

    location: str
    digest: bytes
    row: TokenRow

    @property
    def parts(self) -> tuple["EncodedRow", ...]:
        """Return the row, after those of its earlier answers if the chat template rewrites these."""
        if not self.row.input_ids:
            return ()
        rows = (*self.row.earlier, replace(self.row, earlier=()))
        return tuple(self._replace(row=row) for row in rows)


@dataclass(frozen=True)
class RowEncoder:
    """Tokenizer, chat template and label policy (spec.training.loss) of a run."""

    tokenizer: Any
    loss: str
    chat: ChatTemplate | None
    """None if no source has chat rows."""
    rejected: RowErrors = field(default_factory=RowErrors)
    """Rows that the chat template rejects."""
    special: RowErrors = field(default_factory=RowErrors)
    """Rows whose own text has a special token of the tokenizer, so that it is read as that token."""

    @cached_property
    def _special_tokens(self) -> re.Pattern[str] | None:
        found = [token for token in getattr(self.tokenizer, "all_special_tokens", ()) if len(token) > 1]
        return re.compile("|".join(map(re.escape, found))) if found else None

    def _note_special_tokens(self, located: LocatedRow) -> None:
        if self._special_tokens is None:
            return
        ends = (str(self.tokenizer.eos_token or ""), *(self.chat.end_tokens if self.chat else ()))
        for text in _written(located.row, ends):
            if found := self._special_tokens.search(text):
                self.special.add(located.location, f"'{found[0]}'")
                return

    def encode_rows(self, source: Source, needs_prompt: Callable[[bytes], bool]) -> Iterator[EncodedRow]:
        """Yield the token rows of a source; after the last one, raise DatasetInvalid if the chat template rejected any.

        `needs_prompt` takes the hash of a row; it is true for validation rows. Where invalid rows are left out, those
        that the template rejects have no tokens.
        """
        problems, seen = RowErrors(), 0
        for batch in _batches(source.rows()):
            encoded = self._encode([located.row for located in batch], source.row_format, needs_prompt)
            for located, row in zip(batch, encoded, strict=True):
                seen += 1
                self._note_special_tokens(located)
                if isinstance(row, RowError):
                    problems.add(located.location, row)
                    self.rejected.add(located.location, row)
                    row = _NO_TOKENS  # noqa: PLW2901 (its hash is counted, as in the scan)
                yield EncodedRow(located.location, located.row.digest, row)
        source.check_invalid(problems, seen, "rows cannot be used with the chat template")

    def _encode(
        self, rows: Sequence[Row], row_format: RowFormat, needs_prompt: Callable[[bytes], bool]
    ) -> Sequence[TokenRow | RowError]:
        if row_format == "chat" and self.chat is not None:
            chats = cast("Sequence[Chat]", rows)
            return encode_chats(chats, self.chat, self.loss, [needs_prompt(row.digest) for row in chats])
        if row_format == "text":
            return encode_texts(cast("Sequence[Text]", rows), self.tokenizer)
        return encode_examples(cast("Sequence[Example]", rows), self.tokenizer, self.loss)


def _written(row: Row, ends: Sequence[str]) -> Iterator[str]:
    """Yield the texts of a row that are no part of a template: a prompt may be rendered by spec.dataset.template.

    An end-of-text token at the end of an answer is left out, as it is the one that is expected there.
    """
    if isinstance(row, Chat):
        for message in row.messages:
            content = str(message["content"])
            yield without_end_token(content, ends) if message["role"] == "assistant" else content
    elif isinstance(row, Example):
        yield without_end_token(row.answer, ends)


@dataclass
class RowCounts:
    """Counts of kept, truncated and dropped rows of one split."""

    rows: int = 0
    tokens: int = 0
    truncated: int = 0
    dropped: int = 0
    split: int = 0
    """Conversations that several rows were made of."""
    rejected: int = 0
    """Rows that the chat template rejects."""
    beside_prompt: int = 0
    """Rows that do not begin with the prompt that a server renders; known of validation rows only."""
    lengths: "array[int]" = field(default_factory=lambda: array("I"))
    """Tokens of each row before truncation."""
    longest: int = 0
    """Tokens of the longest row that is kept, after truncation."""
    largest_token: int = 0
    """The largest token id in the rows that are kept."""


@dataclass(frozen=True)
class LengthPolicy:
    """Maximum length of a row, and what happens to longer ones."""

    max_length: int
    long_rows: str
    too_long: RowErrors = field(default_factory=RowErrors)

    def apply(self, encoded: EncodedRow, counts: RowCounts, times: int = 1) -> TokenRow | None:
        """Return the row, truncated if necessary, or None if it is dropped; count it `times` times."""
        length = len(encoded.row.input_ids)
        too_long = length > self.max_length
        if too_long and self.long_rows == "refuse":
            self.too_long.add(encoded.location, f"{length} tokens")
        row = encoded.row.truncate(self.max_length)
        dropped = (too_long and self.long_rows == "drop") or row.label_count == 0
        counts.lengths.extend([length] * times)
        counts.dropped += times * dropped
        counts.truncated += times * (too_long and not dropped)
        if dropped:
            return None
        counts.rows += times
        counts.tokens += times * len(row.input_ids)
        counts.longest = max(counts.longest, len(row.input_ids))
        counts.largest_token = max(counts.largest_token, *row.input_ids)
        return row

    def raise_if_refused(self) -> None:
        """Raise DatasetInvalid if longRows is refuse and rows were too long."""
        if self.too_long.total:
            raise RunError(
                Reason.DATASET_INVALID,
                f"spec.training.longRows: {self.too_long.total} rows have more than maxLength {self.max_length} tokens "
                f"({self.too_long}); shorten them, raise spec.training.maxLength, or set longRows to truncate or drop",
            )


def make_length_policy(training: TrainingSpec) -> LengthPolicy:
    """Return the length policy of spec.training."""
    return LengthPolicy(training.max_length, training.long_rows)


def _batches(rows: Iterable[LocatedRow]) -> Iterator[list[LocatedRow]]:
    """Yield the rows in batches of bounded number and size."""
    batch: list[LocatedRow] = []
    size = 0
    for located in rows:
        size += located.row.size
        if batch and (size > _BATCH_BYTES or len(batch) == BATCH_ROWS):
            yield batch
            batch, size = [], located.row.size
        batch.append(located)
    if batch:
        yield batch
