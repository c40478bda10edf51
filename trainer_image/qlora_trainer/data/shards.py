"""Token rows as Parquet files below the result's prefix: written by prepare, read by training."""

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, overload
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq

from qlora_api.units import MIB
from qlora_trainer.data.tokenization import TokenRow

TRAINING: Final = "prepared/train.parquet"
EVALUATION: Final = "prepared/evaluation.parquet"
FACTS: Final = "prepared/prepared.json"
TASKS: Final = "prepared/tasks.json"
"""Leaf tasks of the requested lm-eval benchmarks."""

GROUP_ROWS: Final = 1000
"""Rows per row group, and per read; a group ends earlier if its rows are large."""
_GROUP_BYTES: Final = 256 * MIB
"""Memory of the rows of a group."""
_TOKEN_BYTES: Final = 40
"""Memory of a token id in a tuple: an int of 32 bytes and its pointer."""

_SCHEMA: Final = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("learned", pa.list_(pa.int32())),
        ("prompt_ids", pa.list_(pa.int32())),
        ("prompt", pa.string()),
        ("reference", pa.string()),
    ]
)


class ShardWriter:
    """Writes rows to a Parquet file, one row group at a time."""

    def __init__(self, path: Path, *, with_text: bool) -> None:
        """Create the file.

        Args:
            path: Target file; missing folders are created.
            with_text: Also store prompt and reference, which only validation rows need.

        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self._with_text = with_text
        self._pending: list[TokenRow] = []
        self._pending_bytes = 0
        self._content = hashlib.sha256()
        self._file = pq.ParquetWriter(path, _SCHEMA, compression="zstd")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._write_group()
        self._file.close()

    @property
    def digest(self) -> str:
        """Return the SHA-256 of the rows so far; it hashes their content, so compression does not change it."""
        return self._content.hexdigest()

    def add(self, row: TokenRow, times: int = 1) -> None:
        """Append a row `times` times."""
        texts = (row.prompt_ids, row.prompt, row.reference) if self._with_text else ()
        content = hashlib.sha256(repr((row.input_ids, row.label_spans, *texts)).encode()).digest()
        for _ in range(times):
            self._content.update(content)
            self._pending.append(row)
            self._pending_bytes += _TOKEN_BYTES * (len(row.input_ids) + len(row.prompt_ids))
            self._pending_bytes += len(row.prompt) + len(row.reference)
            if len(self._pending) == GROUP_ROWS or self._pending_bytes > _GROUP_BYTES:
                self._write_group()

    def _write_group(self) -> None:
        rows, self._pending, self._pending_bytes = self._pending, [], 0
        if rows:
            self._file.write_table(_to_table(rows, with_text=self._with_text))


def _to_table(rows: Sequence[TokenRow], *, with_text: bool) -> pa.Table:
    columns = {
        "input_ids": [row.input_ids for row in rows],
        "learned": [[position for span in row.label_spans for position in span] for row in rows],
        "prompt_ids": [row.prompt_ids if with_text else () for row in rows],
        "prompt": [row.prompt if with_text else "" for row in rows],
        "reference": [row.reference if with_text else "" for row in rows],
    }
    return pa.table(columns, schema=_SCHEMA)


def _to_row(fields: dict[str, Any]) -> TokenRow:
    return TokenRow(
        tuple(fields["input_ids"]),
        tuple(zip(fields["learned"][::2], fields["learned"][1::2], strict=True)),
        tuple(fields["prompt_ids"]),
        fields["prompt"],
        fields["reference"],
    )


class Shard(Sequence[TokenRow]):
    """Random access to the rows of a memory-mapped file; only pages that are read are loaded."""

    def __init__(self, path: Path) -> None:
        """Map an Arrow file written by `open_shard`."""
        self._reader = pa.ipc.open_file(pa.memory_map(str(path)))
        self._starts = [0]
        for number in range(self._reader.num_record_batches):
            self._starts.append(self._starts[-1] + self._reader.get_batch(number).num_rows)

    def __len__(self) -> int:
        return self._starts[-1]

    @overload
    def __getitem__(self, index: int) -> TokenRow: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[TokenRow, ...]: ...
    def __getitem__(self, index: int | slice) -> TokenRow | tuple[TokenRow, ...]:
        """Return a row, or the rows of a slice."""
        selected = range(len(self))[index]
        return self._row(selected) if isinstance(selected, int) else tuple(self._row(number) for number in selected)

    def _row(self, number: int) -> TokenRow:
        batch = bisect_right(self._starts, number) - 1
        (fields,) = self._reader.get_batch(batch).slice(number - self._starts[batch], 1).to_pylist()
        return _to_row(fields)


def open_shard(path: Path) -> Shard:
    """Open a Parquet file for random access, by way of an uncompressed Arrow copy next to it."""
    copy = path.with_suffix(".arrow")
    # The processes of a node share the folder: each writes its own copy, and the last rename wins.
    partial = path.with_suffix(f".{uuid4().hex}.part")
    with pq.ParquetFile(path) as source, pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as file:
        for batch in source.iter_batches(batch_size=GROUP_ROWS):
            file.write_batch(batch)
    partial.replace(copy)
    return Shard(copy)


def read_token_rows(path: Path, numbers: Sequence[int] | None = None) -> Iterator[TokenRow]:
    """Yield the rows of a Parquet file in file order: all of them, or those with the given indices."""
    start = 0
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=GROUP_ROWS):
            indices = range(batch.num_rows) if numbers is None else sorted(number - start for number in numbers)
            for index in indices:
                if 0 <= index < batch.num_rows:
                    yield _to_row(batch.slice(index, 1).to_pylist()[0])
            start += batch.num_rows
