"""Any dataset file ends in rows or in a reason of its own, never in another exception."""

import contextlib
import gzip
import io
import json
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qlora_api.reasons import Reason
from qlora_api.v1alpha1 import DataSource, RowTemplate
from qlora_trainer.data.row_formats import detect_format, parse_row
from qlora_trainer.data.rows import RowError
from qlora_trainer.data.sources import make_source
from qlora_trainer.errors import RunError
from qlora_trainer.storage.store import DATASET_FIELD
from tests.unit.security.children import run_in_child
from tests.unit.security.fuzzing import json_objects, json_values, mutations

CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
ROWS = [
    {"prompt": "a", "completion": "b,\n"},
    {"prompt": 'c"', "completion": "ü"},
    {"messages": CHAT, "tools": [{"a": 1}]},
]
LINES = "".join(f"{json.dumps(row)}\n" for row in ROWS).encode()
TABLE = pa.table({"prompt": ["a", "b", None], "completion": ["c", "c", "ü"], "tags": [["x"], [], None]})


def parquet_bytes() -> bytes:
    sink = io.BytesIO()
    pq.write_table(TABLE, sink)
    return sink.getvalue()


def arrow_bytes() -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, TABLE.schema) as file:
        file.write_table(TABLE)
    return sink.getvalue()


TEXT_SEEDS = {
    "x.jsonl": LINES,
    "x.jsonl.gz": gzip.compress(LINES, mtime=0),
    "x.json": json.dumps(ROWS).encode(),
    "x.csv": b'prompt,completion\na,"b, ""c"""\nd,e\n',
    "x.tsv.gz": gzip.compress(b"prompt\tcompletion\na\tb\n", mtime=0),
}
TEXT_FILES = st.sampled_from(sorted(TEXT_SEEDS)).flatmap(
    lambda name: st.tuples(st.just(name), mutations(TEXT_SEEDS[name]) | st.binary(max_size=200))
)
COLUMNAR_SEEDS = {"x.parquet": parquet_bytes(), "x.arrow": arrow_bytes()}
COLUMNAR_FILES = st.sampled_from(sorted(COLUMNAR_SEEDS)).flatmap(
    lambda name: st.tuples(st.just(name), mutations(COLUMNAR_SEEDS[name]))
)


def read(name: str, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(content)
        source = make_source(DATASET_FIELD, (path,), DataSource(uri="s3://data/rows"), None)
        for located in source.rows():
            assert located.row.digest


@given(file=TEXT_FILES)
def test_text_file_ends_in_rows_or_in_a_reason(file):
    try:
        read(*file)
    except RunError as error:
        check_error(error)


def check_error(error: RunError) -> None:
    assert error.reason in {Reason.DATASET_INVALID, Reason.DATASET_EMPTY}
    assert error.message.encode()


def read_all(files: list[tuple[str, bytes]]) -> str:
    """Read several files in one process; return the one that ended in something else."""
    for file in files:
        try:
            read(*file)
        except RunError as error:
            check_error(error)
    return ""


@settings(max_examples=max(5, settings.default.max_examples // 10))
@given(files=st.lists(COLUMNAR_FILES, min_size=10, max_size=10))
def test_columnar_file_ends_in_rows_or_in_a_reason(files):
    """In a process of its own: a fault in Arrow's C++ code would end this one."""
    ended = run_in_child(read_all, files)
    assert (ended.reason, ended.message) == ("", "")


KEYS = ("messages", "conversations", "instruction", "input", "context", "output", "response", "prompt", "completion")
MESSAGES = st.lists(json_objects("role", "from", "content", "value", "tool_calls"), max_size=4)
ROLES = st.sampled_from(["user", "assistant", "system", "tool", "gpt", "human", "x"])
TURNS = st.lists(
    st.fixed_dictionaries({"role": ROLES, "content": st.text(max_size=5)}, optional={"tool_calls": json_values()}),
    max_size=4,
)


@given(
    fields=json_objects(*KEYS, "text", "tools")
    | st.fixed_dictionaries({"messages": MESSAGES | TURNS, "tools": json_values()})
)
@example(fields={"messages": CHAT, "tools": [{"name": "\ud800"}]})
@example(fields={"messages": [CHAT[0], {**CHAT[1], "tool_calls": [{"name": "\udfff"}]}]})
def test_row_is_parsed_or_invalid(fields):
    with contextlib.suppress(RowError):
        row = parse_row(fields, detect_format(fields)[0])
        assert row.digest
        assert row.size >= 0


@given(fields=json_objects("a", "b"), prompt=st.sampled_from(["{a}", "{a}{b}", "{a}" * 50]))
def test_template_is_filled_or_the_row_invalid(fields, prompt):
    with contextlib.suppress(RowError):
        assert parse_row(fields, "instruction", RowTemplate(prompt=prompt, answer="{b}")).digest


@pytest.mark.parametrize("seed", sorted(TEXT_SEEDS | COLUMNAR_SEEDS))
def test_seeds_are_read_up_to_the_row_that_is_of_another_format(seed):
    expected = (
        pytest.raises(RunError, match="row 3") if "json" in seed or seed in COLUMNAR_SEEDS else contextlib.nullcontext()
    )
    with expected:
        read(seed, (TEXT_SEEDS | COLUMNAR_SEEDS)[seed])
