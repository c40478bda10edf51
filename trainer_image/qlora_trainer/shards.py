"""Token rows as parquet files in the result's prefix: what prepare leaves and training starts from."""

import io
from collections.abc import Sequence
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from qlora_trainer.tokens import TokenRow

TRAINING: Final = "prepared/train.parquet"
EVALUATION: Final = "prepared/evaluation.parquet"
FACTS: Final = "prepared/prepared.json"

_SCHEMA: Final = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("learned", pa.list_(pa.int32())),
        ("prompt_ids", pa.list_(pa.int32())),
        ("prompt", pa.string()),
        ("reference", pa.string()),
    ]
)


def to_parquet(rows: Sequence[TokenRow], *, with_text: bool) -> bytes:
    """Return the rows as a parquet file; what is asked and expected is needed for held-out rows only."""
    columns = {
        "input_ids": [row.input_ids for row in rows],
        "learned": [[position for span in row.learned for position in span] for row in rows],
        "prompt_ids": [row.prompt_ids if with_text else () for row in rows],
        "prompt": [row.prompt if with_text else "" for row in rows],
        "reference": [row.reference if with_text else "" for row in rows],
    }
    sink = io.BytesIO()
    pq.write_table(pa.table(columns, schema=_SCHEMA), sink, compression="zstd")
    return sink.getvalue()


def from_parquet(content: bytes) -> tuple[TokenRow, ...]:
    """Return the rows of a parquet file."""
    table = pq.read_table(io.BytesIO(content), schema=_SCHEMA)
    return tuple(
        TokenRow(
            tuple(row["input_ids"]),
            tuple(zip(row["learned"][::2], row["learned"][1::2], strict=True)),
            tuple(row["prompt_ids"]),
            row["prompt"],
            row["reference"],
        )
        for row in table.to_pylist()
    )
