"""Looks at a local data file before a manifest is written, with the trainer's own readers and without torch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from qlora_api.units import GIB

MAX_PREVIEWED: Final = 100_000
"""Rows that are read; more are only said to be more."""
MAX_CHARACTERS: Final = GIB
"""Characters of rows that are read, as for MAX_PREVIEWED."""
CHARACTERS_PER_TOKEN: Final = 4
"""Of English text, roughly (OpenAI's rule of thumb); it only makes a comment."""


class PreviewError(Exception):
    """The file cannot be trained on; the message says why."""


@dataclass(frozen=True)
class DataPreview:
    """What a data file has."""

    rows: int
    complete: bool
    """Whether all rows were read."""
    format: str
    """Format of the first row, and the field that shows it."""
    longest: int
    """Characters of the longest row."""

    def __str__(self) -> str:
        count = f"{self.rows:,}" if self.complete else f"more than {self.rows:,}"
        tokens = self.longest // CHARACTERS_PER_TOKEN
        return f"{count} {self.format}; the longest has {self.longest:,} characters, some {tokens:,} tokens"


def preview_data(path: Path) -> DataPreview:
    """Read the rows of a file.

    Raises:
        PreviewError: There is no such file, it has no rows, or the first cannot be read.

    """
    # Imported here because they belong to the optional trainer.
    from qlora_trainer.data.compressed_files import FileError  # noqa: PLC0415
    from qlora_trainer.data.file_readers import read_rows  # noqa: PLC0415
    from qlora_trainer.data.row_formats import detect_format  # noqa: PLC0415
    from qlora_trainer.data.rows import RowError  # noqa: PLC0415

    if not path.is_file():
        raise PreviewError(f"there is no file {path}; correct the path")
    found = _Rows()
    try:
        for row in read_rows(path):
            if not found.has_room():
                break
            found.add(None if isinstance(row.content, RowError) else row.content)
        else:
            found.complete = True
        if found.first is None:
            raise PreviewError(f"{path} has no rows that can be read; see docs/data.md for the formats")
        name, why = detect_format(found.first)
    except (FileError, RowError, OSError, ValueError, ImportError) as error:
        raise PreviewError(f"{path}: {error}") from error
    except TypeError as error:  # a map of a Parquet file may have bytes or dates as keys
        raise PreviewError(f"{path}: a row has an object whose keys are not text; write the keys as text") from error
    return DataPreview(found.count, found.complete, f"{name} rows, by the field {why}", found.longest)


@dataclass
class _Rows:
    """What is remembered of the rows; they themselves would fill the memory."""

    count: int = 0
    first: Mapping[str, Any] | None = None
    """The first that can be read."""
    longest: int = 0
    characters: int = 0
    complete: bool = False

    def has_room(self) -> bool:
        return self.count < MAX_PREVIEWED and self.characters <= MAX_CHARACTERS

    def add(self, row: Mapping[str, Any] | None) -> None:
        """Count a row; None: it cannot be read."""
        self.count += 1
        if row is not None:
            self.first = row if self.first is None else self.first
            length = len(json.dumps(row, ensure_ascii=False, default=str))
            self.longest, self.characters = max(self.longest, length), self.characters + length
