"""Merging a published adapter into a local folder: measured if rows are available, and written atomically."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_api.local_requests import MergedFolder, MergeRequest
from qlora_api.reasons import Reason
from qlora_api.report import EvaluatedRow, RowScore
from qlora_api.units import MIB
from qlora_trainer import merge_job
from qlora_trainer.data.shards import EVALUATION, ShardWriter
from qlora_trainer.errors import RunError
from qlora_trainer.inference.published_adapter import PublishedAdapter
from qlora_trainer.merge_job import check_target, find_rows, merge_published, parents
from qlora_trainer.publishing.merge_weights import MergeTask
from tests.unit.trainer.inference.test_published_adapter import bucket
from tests.unit.trainer.tiny import instruction_rows, write_model
from tests.unit.trainer.trained import PLAIN, RESOLVER, write_published
from tests.unit.trainer.tuned import NF4, token_rows

__all__ = ["bucket"]  # a fixture


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("result")
    write_model(folder / "model")
    return write_published(folder / "0123", folder / "model", PLAIN, NF4)


def write_shard(folder, rows):
    with ShardWriter(folder / EVALUATION, with_text=True) as writer:
        for row in rows:
            writer.add(row)


def merged(adapter, target, tmp_path, notes=None, **request) -> MergedFolder:
    merge_request = MergeRequest(adapter=f"file://{adapter}", target=str(target), **request)
    return merge_published(merge_request, RESOLVER, tmp_path / "work", (notes if notes is not None else []).append)


def test_merge_writes_a_model_and_measures_the_difference(adapter, tmp_path):
    rows, notes = token_rows(4), []
    write_shard(adapter.parent, rows)
    try:
        found = merged(adapter, tmp_path / "out/merged", tmp_path, notes, base="dequantised")
    finally:
        (adapter.parent / EVALUATION).unlink()
    assert found.merge.difference.tokens == sum(row.label_count for row in rows)
    assert found.merge.difference.relative < 0.02
    assert (found.folder, found.adapter) == (str(tmp_path / "out/merged"), f"file://{adapter}")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out/merged").dtype == torch.bfloat16
    assert (tmp_path / "out/merged/merge.json").is_file()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["merged"]
    assert notes[1:] == [
        "evaluating base and adapter unmerged on 4 held-out rows",
        "merging into the dequantised base, layer by layer",
        "evaluating the merged model",
    ]


def test_s3_adapter_is_measured_on_the_rows_of_its_result(adapter, tmp_path, bucket):
    for file in adapter.iterdir():
        bucket.upload_file(str(file), "adapters", f"bot/0123/adapter/{file.name}")
    write_shard(tmp_path, token_rows(4))
    bucket.upload_file(str(tmp_path / EVALUATION), "adapters", f"bot/0123/{EVALUATION}")
    request = MergeRequest(adapter="s3://adapters/bot/0123/adapter/", target=str(tmp_path / "merged"))
    found = merge_published(request, RESOLVER, tmp_path / "work")
    assert (found.adapter, found.merge.difference.rows) == ("s3://adapters/bot/0123/adapter", 4)


@pytest.mark.parametrize(("unread_bytes", "expected"), [(0, 3), (1, 2)])
def test_merge_without_shards_measures_on_report_rows(adapter, tmp_path, monkeypatch, unread_bytes, expected):
    score = RowScore(loss=1.0, correct=1)
    rows = [
        EvaluatedRow(tokens=5, prompt=row["instruction"], reference=row["output"], base=score, adapter=score)
        for row in instruction_rows(3)
    ]
    report = adapter.parent / "report/evaluation.jsonl"
    report.parent.mkdir()
    without = EvaluatedRow(tokens=5, prompt="", reference="", base=score, adapter=score)
    report.write_text("".join(f"{row.model_dump_json(by_alias=True)}\n" for row in (without, *rows)))
    monkeypatch.setattr(merge_job, "_MEASURED_BYTES", report.stat().st_size - unread_bytes)
    try:
        found = merged(adapter, tmp_path / "merged", tmp_path)
    finally:
        report.unlink()
        report.parent.rmdir()
    assert found.merge.difference.rows == expected


def test_rows_that_take_too_much_memory_are_not_measured(tmp_path, monkeypatch):
    """One text of 16 MiB, which a dictionary repeats."""
    write_shard(tmp_path, token_rows(64))
    rows = pq.read_table(tmp_path / EVALUATION)
    repeated = pa.DictionaryArray.from_arrays(pa.array([0] * 64, pa.int32()), pa.array(["x" * (16 * MIB)]))
    position = rows.schema.get_field_index("prompt")
    pq.write_table(rows.set_column(position, "prompt", repeated), tmp_path / EVALUATION, compression="zstd")
    published = PublishedAdapter(f"file://{tmp_path}/adapter", tmp_path / "adapter", record=None)
    monkeypatch.setattr(merge_job, "_MAX_ROWS_BYTES", 256 * MIB)
    assert find_rows(RESOLVER, published, tmp_path / "work") == ()


def test_merge_with_another_base_folder_and_without_rows_is_not_measured(adapter, tmp_path):
    (adapter.parent.parent / "model").rename(tmp_path / "moved")
    try:
        (tmp_path / "empty").mkdir()
        found = merged(adapter, tmp_path / "empty", tmp_path, model=f"file://{tmp_path}/moved")
    finally:
        (tmp_path / "moved").rename(adapter.parent.parent / "model")
    assert found.merge.difference is None
    assert (found.base_model, found.base_commit) == (f"file://{tmp_path}/moved", None)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("No space left on device")])
def test_interrupted_merge_leaves_no_files(adapter, tmp_path, monkeypatch, error):
    def interrupt(_task: MergeTask, folder, _note):
        (folder / "config.json").write_text("{}")
        raise error

    monkeypatch.setattr(merge_job, "merge_adapter", interrupt)
    with pytest.raises(type(error) if isinstance(error, Exception) else error):
        merged(adapter, tmp_path / "out/merged", tmp_path)
    assert list((tmp_path / "out").iterdir()) == []


def test_loftq_adapter_is_rejected_on_the_original_base(tmp_path):
    write_model(tmp_path / "model")
    adapter = write_published(tmp_path / "0123", tmp_path / "model", PLAIN, NF4, init="loftq")
    with pytest.raises(RunError, match="set --base dequantised") as caught:
        merged(adapter, tmp_path / "merged", tmp_path)
    assert caught.value.reason is Reason.INVALID_SPEC
    assert merged(adapter, tmp_path / "merged", tmp_path, base="dequantised").merge.base == "dequantised"


def test_merge_into_non_empty_folder_is_rejected(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/model.safetensors").write_text("")
    for taken in ("file", "full"):
        with pytest.raises(RunError, match=f"--to: {tmp_path}/{taken} is not an empty folder; choose another one"):
            check_target(tmp_path / taken)
    check_target(tmp_path / "new")


def test_merge_into_unwritable_folder_is_rejected(adapter, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=f"--to: cannot write {tmp_path}/file/merged: Not a directory; choose another"):
        merged(adapter, tmp_path / "file/merged", tmp_path)


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("s3://bucket/team/bot/0123/adapter", ("s3://bucket/team/bot/0123", "s3://bucket/team/bot")),
        ("s3://bucket/adapter", ("s3://bucket",)),
        ("s3://bucket", ()),
        ("file:///adapter", ()),
        ("file:///out/0123/rejected/adapter", ("file:///out/0123/rejected", "file:///out/0123")),
    ],
)
def test_parents_of_an_adapter_uri(uri, expected):
    assert parents(uri) == expected
