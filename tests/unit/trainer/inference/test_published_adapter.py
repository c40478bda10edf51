"""Downloading a published adapter and its base; other folders are rejected with what they are."""

import json
from datetime import UTC, datetime

import boto3
import pytest
from moto import mock_aws

from qlora_api.reasons import Reason
from qlora_api.report import ResultManifest
from qlora_api.v1alpha1 import RowTemplate
from qlora_trainer.errors import RunError
from qlora_trainer.inference.published_adapter import fetch_base, open_adapter
from qlora_trainer.stages import build_record
from qlora_trainer.storage.results import manifest_json
from qlora_trainer.storage.store import MODEL_FIELD
from tests.unit.cli.make import RESULT, make_prepared
from tests.unit.trainer.tiny import make_spec, run_config, write_model
from tests.unit.trainer.trained import RESOLVER, make_record
from tests.unit.trainer.tuned import NF4, SETTINGS

TEMPLATE = RowTemplate(prompt="Q: {question}\nA:", answer=" {answer}")
RECORD = make_record(NF4)


def opened(uri: str, work):
    return open_adapter(RESOLVER, uri, "ADAPTER", work)


def write_record(folder, record=RECORD, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    content = json.loads(record.model_dump_json(by_alias=True)) | changes
    (folder / "qlora.json").write_text(json.dumps(content))
    return f"file://{folder}"


def test_local_folder_is_used_in_place(tmp_path):
    found = opened(write_record(tmp_path / "my adapter") + "/", tmp_path / "work")
    assert (found.folder, found.record) == (tmp_path / "my adapter", RECORD)


def test_record_of_an_older_release_is_read(tmp_path):
    content = RECORD.model_dump_json(by_alias=True, exclude={"template", "init"})
    (tmp_path / "qlora.json").write_text(content)
    record = opened(f"file://{tmp_path}", tmp_path).record
    assert (record.template, record.init) == (None, "default")


def test_record_has_the_prompt_template_and_the_initialization():
    spec = make_spec("hf://o/m", "s3://data/rows.jsonl", "s3://out", lora={"init": "loftq", "dropout": 0})
    spec = spec.model_copy(update={"dataset": spec.dataset.model_copy(update={"template": TEMPLATE})})
    record = build_record(run_config(spec, make_prepared()), SETTINGS)
    assert (record.template, record.init, record.parameters) == (TEMPLATE, "loftq", 9)
    assert (record.base, record.commit, record.format) == ("hf://organization/name", "c" * 40, "instruction")


@pytest.fixture
def bucket(monkeypatch):
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, "testing")
    with mock_aws():
        client = boto3.client("s3", region_name="us-east-1")
        client.create_bucket(Bucket="adapters")
        yield client


def test_s3_adapter_is_downloaded_again_after_a_change(bucket, tmp_path):
    record = RECORD.model_dump_json(by_alias=True).encode()
    bucket.put_object(Bucket="adapters", Key="bot/1/adapter/qlora.json", Body=record)
    bucket.put_object(Bucket="adapters", Key="bot/1/adapter/weights", Body=b"old")
    first = opened("s3://adapters/bot/1/adapter", tmp_path)
    bucket.put_object(Bucket="adapters", Key="bot/1/adapter/weights", Body=b"new")
    second = opened("s3://adapters/bot/1/adapter/", tmp_path)
    assert [(one.folder / "weights").read_bytes() for one in (first, second)] == [b"old", b"new"]
    assert opened("s3://adapters/bot/1/adapter", tmp_path).folder == second.folder


def rejection(uri: str, work) -> str:
    with pytest.raises(RunError) as caught:
        opened(uri, work)
    assert caught.value.reason is Reason.INVALID_SPEC
    return caught.value.message


def test_folder_without_record_is_rejected_with_what_it_is(tmp_path):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/adapter_config.json").write_text("{}")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("")
    where = f"file://{tmp_path}"
    fix = "give the folder 'adapter' of a published result"
    assert rejection(f"{where}/none", tmp_path) == f"ADAPTER: {where}/none holds no files; {fix}"
    assert rejection(f"{where}/other", tmp_path) == f"ADAPTER: {where}/other has no qlora.json; {fix}"
    assert "is an adapter without qlora.json, so its base and prompt format are unknown" in rejection(
        f"{where}/foreign", tmp_path
    )
    assert rejection("hf://o/adapter", tmp_path).endswith(
        "hf://o/adapter is neither a folder nor an s3:// URI; download it first"
    )


def test_result_folder_is_rejected_and_names_its_adapter(tmp_path):
    manifest = ResultManifest(
        digest="0123456789abcdef",
        job="colours",
        namespace="ml",
        base_model="hf://o/m",
        base_commit="c",
        dataset_uri="s3://d",
        dataset_digest="d",
        trainer_version="1",
        created_at=datetime(2026, 1, 31, tzinfo=UTC),
        result=RESULT,
        files=(),
    )
    (tmp_path / "manifest.json").write_bytes(manifest_json(manifest))
    assert rejection(f"file://{tmp_path}", tmp_path).endswith(f"is a result folder; its adapter is {RESULT.adapter}")


def test_unknown_field_in_the_record_of_a_newer_release_is_ignored_with_a_warning(tmp_path, caplog):
    record = opened(write_record(tmp_path, laterField=1), tmp_path).record
    assert record == RECORD
    assert "qlora.json: fields that this version does not know are ignored, here and in others alike: laterField" in (
        caplog.text
    )


def test_unknown_value_in_the_record_of_a_newer_release_is_rejected_and_names_the_field(tmp_path):
    uri = write_record(tmp_path, dtype="float8")
    assert rejection(uri, tmp_path).startswith(f"ADAPTER: {uri}/qlora.json: dtype: Input should be ")
    assert rejection(uri, tmp_path).endswith("; use the release that wrote it or a later one")


def test_full_finetune_result_is_rejected_as_adapter(tmp_path):
    assert "was trained with method full and is a complete model" in rejection(
        write_record(tmp_path, method="full"), tmp_path
    )


def test_fetched_base_is_at_the_recorded_commit(tmp_path):
    uri = write_model(tmp_path / "model")
    other = write_model(tmp_path / "other", seed=1)
    commit = RESOLVER.resolve(uri, "main", MODEL_FIELD).commit
    record = RECORD.model_copy(update={"base": uri, "commit": commit})
    assert fetch_base(RESOLVER, record, None, tmp_path) == tmp_path / "model"
    assert fetch_base(RESOLVER, record, other, tmp_path) == tmp_path / "other"
    changed = record.model_copy(update={"commit": "0" * 40})
    assert base_refusal(changed, tmp_path).startswith(f"the files at {uri} have changed since the adapter was trained")


def test_unreachable_base_error_names_base_model_option(tmp_path):
    missing = RECORD.model_copy(update={"base": f"file://{tmp_path}/gone"})
    assert base_refusal(missing, tmp_path) == (
        f"the adapter's base (--base-model overrides it): file://{tmp_path}/gone holds no files"
    )
    claim = RECORD.model_copy(update={"base": "pvc://models/llama"})
    assert base_refusal(claim, tmp_path).endswith("which only a cluster can mount; copy it and set --base-model")


def base_refusal(record, work) -> str:
    with pytest.raises(RunError) as caught:
        fetch_base(RESOLVER, record, None, work)
    assert caught.value.reason is Reason.MODEL_NOT_FOUND
    return caught.value.message
