"""Looks at a local data file before a manifest is written, with the trainer's own readers and without torch."""

import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

MAX_PREVIEWED: Final = 100_000
"""Rows that are read; more are only said to be more."""
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
    try:
        rows = [row.content for row in islice(read_rows(path), MAX_PREVIEWED + 1)]
        valid = [row for row in rows if not isinstance(row, RowError)]
        if not valid:
            raise PreviewError(f"{path} has no rows that can be read; see docs/data.md for the formats")
        name, why = detect_format(valid[0])
        longest = max(len(json.dumps(row, ensure_ascii=False, default=str)) for row in valid)
    except (FileError, RowError, OSError, ValueError, ImportError) as error:
        raise PreviewError(f"{path}: {error}") from error
    except TypeError as error:  # a map of a Parquet file may have bytes or dates as keys
        raise PreviewError(f"{path}: a row has an object whose keys are not text; write the keys as text") from error
    return DataPreview(
        min(len(rows), MAX_PREVIEWED), len(rows) <= MAX_PREVIEWED, f"{name} rows, by the field {why}", longest
    )
