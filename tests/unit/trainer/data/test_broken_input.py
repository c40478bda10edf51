"""Invalid datasets and configurations are refused before training, with reason, field or row, and fix."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from qlora_api.reasons import Reason
from qlora_cli.manifests.loader import ManifestError, parse_manifest
from qlora_cli.manifests.yaml_documents import read_documents
from qlora_planner.validation import CLUSTER_RULES
from qlora_trainer.errors import RunError
from qlora_trainer.prepare import prepare
from tests.make import make_manifest
from tests.unit.trainer.tiny import make_spec, prepare_config, write_model

GOOD = '{"prompt": "1+1=", "completion": "2"}\n{"prompt": "1+2=", "completion": "3"}\n'
USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}
CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
STRICT = "{% if messages[1].role == 'user' %}{{ raise_exception('roles must alternate') }}{% endif %}" + CHATML
NUMBER = "field 'text' is a number"
INVALID, EMPTY, SPEC = Reason.DATASET_INVALID, Reason.DATASET_EMPTY, Reason.INVALID_SPEC


def lines(*rows: Any) -> str:
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def chat(*messages: dict[str, Any]) -> tuple[str, str, dict[str, Any]]:
    return "x.jsonl", lines({"messages": [USER, ANSWER]}, {"messages": list(messages)}), {
        "dataset": {"chatTemplate": CHATML}
    }  # fmt: skip


def parquet(**columns: list[Any]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


def data(name: str, content: str | bytes, **blocks: Any) -> tuple[str, str | bytes, dict[str, Any]]:
    return name, content, blocks


BROKEN_DATA = {
    # files
    "no-file": (data("", ""), Reason.DATASET_NOT_FOUND, "there is no file", "correct the URI"),
    "unknown-type": (data("x.xlsx", "PK"), INVALID, "'x.xlsx' is not a supported", "use .jsonl, .json, .csv"),
    "empty-file": (data("x.jsonl", ""), EMPTY, "the file has no rows", "add rows"),
    "one-row": (data("x.jsonl", GOOD.splitlines()[0]), EMPTY, "1 distinct row", "add rows, or set spec"),
    "utf-16": (data("x.csv", "prompt,completion\n".encode("utf-16")), INVALID, "is UTF-16", "save it as UTF-8"),
    "not-gzip": (data("x.jsonl.gz", GOOD), INVALID, "or invalid gzip file", "compress it again"),
    "cut-gzip": (data("x.jsonl.gz", gzip.compress(GOOD.encode())[:-6]), INVALID, "incomplete", "compress it ag"),
    "not-parquet": (data("x.parquet", GOOD), INVALID, "is not a readable Parquet file", "write it again"),
    "not-arrow": (data("x.arrow", GOOD), INVALID, "is not a readable Arrow file", "write it again"),
    "json-object": (data("x.json", '{"data": []}'), INVALID, "is not an array", "or one object per line in"),
    "json-comma": (data("x.json", '[{"text": "a"} {"text": "b"}]'), INVALID, "row 1 is followed by", "write a comma"),
    "csv-header-twice": (data("x.csv", "text,text\na,b\n"), INVALID, "two columns 'text'", "rename one"),
    "csv-semicolons": (data("x.csv", "prompt;completion\na;b\n"), INVALID, "one column", "separate columns by"),
    # rows
    "json-syntax": (data("x.jsonl", GOOD + "{oops\n"), INVALID, "row 3: broken JSON at column 2", "1 of 3 rows"),
    "no-object": (data("x.jsonl", GOOD + "[1]\n"), INVALID, "row 3: is a list, not an object", "write {…}"),
    "encoding": (data("x.jsonl", GOOD.encode() + b'{"prompt": "\xe4"}'), INVALID, "row 3: byte 13", "save the file as"),
    "csv-cells": (data("x.csv", "text\na\nb,c\n"), INVALID, "row 3: has 2 cells", "quote cells"),
    "csv-empty-cell": (data("x.csv", "prompt,completion\nc,\n"), INVALID, "row 2: field 'completion' is empty", "fill"),
    "csv-latin-1": (data("x.csv", "text\na\nä\n".encode("latin-1")), INVALID, "row 3: field 'text' con", "as UTF-8"),
    "parquet-null": (data("x.parquet", parquet(text=["a", None])), INVALID, "row 2: field 'text' is null", "write a "),
    "parquet-number": (data("x.parquet", parquet(text=[1, 2])), INVALID, f"row 1: {NUMBER} (1)", "write a string"),
    "parquet-nan": (data("x.parquet", parquet(text=[float("nan")])), INVALID, f"row 1: {NUMBER} (nan)", "write a stri"),
    "unknown-fields": (data("x.jsonl", lines({"question": "a"})), INVALID, "row 1 has the fields question", "template"),
    "missing-field": (data("x.jsonl", GOOD + '{"prompt": "x"}'), INVALID, "row 3: field 'completion' is m", "add it"),
    "wrong-format": (
        data("x.jsonl", GOOD, dataset={"format": "chat"}), INVALID, "row 1: field 'messages' (or 'conver", "add it",
    ),
    "template-field": (
        data("x.jsonl", GOOD, dataset={"template": {"prompt": "{question}", "answer": "{completion}"}}),
        INVALID, "row 1: spec.dataset.template.prompt uses the field 'question'", "correct one",
    ),
    # conversations
    "chat-role": (chat({"role": "bot", "content": "x"}), INVALID, "row 2: messages[0].role is 'bot'", "write system, "),
    "chat-empty": (chat(USER, {**ANSWER, "content": " "}), INVALID, "row 2: messages[1].content is empty", "fill it"),
    "chat-starts": (chat(ANSWER), INVALID, "row 2: messages[0] is from the assistant", "starts with the user"),
    "chat-ends": (chat(USER, ANSWER, USER), INVALID, "row 2: messages[2], the last, is from the user", "end with"),
    "chat-refused": (
        data("x.jsonl", lines({"messages": [USER, ANSWER]}, {"messages": [USER, USER, ANSWER]}),
             dataset={"chatTemplate": STRICT}),
        INVALID, "row 2: the chat template rejects it: roles must alternate", "correct the row or the template",
    ),
    # settings that do not fit the data
    "no-chat-template": (
        data("x.jsonl", lines({"messages": [USER, ANSWER]}, {"messages": [USER, ANSWER, USER, ANSWER]})),
        Reason.MODEL_UNSUPPORTED, "spec.model.uri: the model has no chat template", "set spec.dataset.chatTemplate",
    ),
    "template-syntax": (
        data("x.jsonl", lines({"messages": [USER, ANSWER]}, {"messages": [USER, ANSWER, USER, ANSWER]}),
             dataset={"chatTemplate": "{% for m in messages %}"}),
        SPEC, "spec.dataset.chatTemplate: the chat template cannot render", "line 1",
    ),
    "loss-of-texts": (
        data("x.jsonl", lines({"text": "a"}, {"text": "b"}), training={"loss": "completion"}),
        SPEC, "spec.training.loss: completion needs rows with an answer", "set auto or all",
    ),
    "long-rows": (
        data("x.jsonl", GOOD + lines({"prompt": "p", "completion": "word " * 99}),
             training={"maxLength": 16, "longRows": "refuse"}),
        INVALID, "spec.training.longRows: 1 rows have more than maxLength 16 tokens (row 3: ", "shorten them, raise",
    ),
    "only-long-prompts": (
        data("x.jsonl", lines(*({"prompt": f"{number} word " * 30, "completion": "x"} for number in range(4))),
             training={"maxLength": 16}),
        EMPTY, "spec.training.maxLength: every training row has a prompt that fills all 16 tokens", "raise maxLength",
    ),
    "weights-leave-nothing": (
        data("x.jsonl", GOOD, dataset={"uri": None, "sources": [{"weight": 0.1}]}),
        EMPTY, "every row is also in the validation set", "add rows",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("case", BROKEN_DATA.values(), ids=BROKEN_DATA)
def test_broken_dataset_is_refused_with_reason_location_and_fix(tmp_path, model, case):
    (name, content, blocks), reason, location, fix = case
    path = tmp_path / (name or "absent.jsonl")
    if name:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    for source in blocks.get("dataset", {}).get("sources", ()):
        source["uri"] = f"file://{path}"
    spec = make_spec(model, f"file://{path}", f"file://{tmp_path / 'output'}", **blocks)
    with pytest.raises(RunError) as caught:
        prepare(prepare_config(spec), work=tmp_path / "work")
    message = caught.value.message
    assert caught.value.reason == reason, message
    assert message.startswith("spec.")
    assert location in message
    assert fix in message
    assert not [found for found in (tmp_path / "output").rglob("*") if found.is_file()], "no file is left behind"


BROKEN_CONFIGURATION: dict[str, tuple[dict[str, Any], str, str]] = {
    "misspelt-field": ({"lora": {"rnak": 8}}, "spec.lora.rnak: unknown field", "did you mean rank?"),
    "rank-0": ({"lora": {"rank": 0}}, "spec.lora.rank", "must be ≥ 1, got 0"),
    "no-number": ({"training": {"epochs": "three"}}, "spec.training.epochs", 'must be a number, got "three"'),
    "unknown-choice": ({"training": {"loss": "answer"}}, "spec.training.loss", "must be 'auto', 'completion', "),
    "bits-5": ({"quantization": {"bits": 5}}, "spec.quantization.bits", "must be 4, 8 or 16"),
    "qlora-16": ({"quantization": {"bits": 16}}, "spec.quantization.bits", "set spec.method to lora"),
    "micro-batch": ({"training": {"microBatchSize": 3}}, "spec.training.microBatchSize 3", "leave it out"),
    "no-scheme": ({"dataset": {"uri": "train.jsonl"}}, "spec.dataset.uri", "write s3://bucket/train.jsonl"),
    "bad-claim": ({"dataset": {"uri": "pvc://Rows/x.csv"}}, "spec.dataset.uri", "write pvc://claim/path; the name"),
    "local-file": ({"dataset": {"uri": "file:///x.csv"}}, "spec.dataset.uri is file:///x.csv", "upload it and use s3://"),
    "no-rows": ({"dataset": {"uri": None}}, "spec.dataset has neither uri nor sources", "give one of them"),
    "two-origins": ({"dataset": {"sources": [{"uri": "s3://data/x.csv"}]}}, "both uri and sources", "give one of them"),
    "no-source": ({"dataset": {"uri": None, "sources": []}}, "spec.dataset.sources", "must have 1 or more entries"),
    "weight-0": (
        {"dataset": {"uri": None, "sources": [{"uri": "s3://data/x.csv", "weight": 0}]}},
        "spec.dataset.sources[0].weight", "must be > 0, got 0",
    ),
    "no-placeholder": (
        {"dataset": {"template": {"prompt": "Q: question", "answer": "{answer}"}}},
        "spec.dataset.template.prompt", "must look like Q: {question}",
    ),
    "template-of-chats": (
        {"dataset": {"format": "chat", "template": {"prompt": "{a}", "answer": "{b}"}}},
        "spec.dataset.template produces instruction rows", "leave format out, or remove the template",
    ),
    "half-held-out": ({"dataset": {"evaluation": {"fraction": 0.9}}}, "dataset.evaluation.fraction", "must be ≤ 0.5"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN_CONFIGURATION.values(), ids=BROKEN_CONFIGURATION)
def test_invalid_configuration_is_refused_with_field_and_fix(tmp_path: Path, case):
    change, field, fix = case
    manifest = tmp_path / "job.yaml"
    manifest.write_text(yaml.safe_dump(make_manifest(**change), allow_unicode=True))
    (document,) = read_documents(str(manifest))
    with pytest.raises(ManifestError) as caught:
        parse_manifest(document, CLUSTER_RULES)
    assert field in str(caught.value)
    assert fix in str(caught.value)


def test_invalid_inputs_are_at_least_thirty():
    assert len(BROKEN_DATA) + len(BROKEN_CONFIGURATION) >= 30
