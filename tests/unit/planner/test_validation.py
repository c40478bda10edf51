"""What a spec may not ask for, and that the sentence names field, cause and fix."""

from typing import Any

import pytest

from qlora_planner.validation import COMMON_RULES, LOCAL_RULES, check
from tests.make import make_spec


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        pytest.param({"quantization": {"bits": 16}}, "set spec.method to lora", id="qlora-16"),
        pytest.param({"method": "lora"}, "set spec.method to qlora", id="lora-4"),
        pytest.param({"method": "full"}, "method full needs 16", id="full-4"),
        pytest.param({"training": {"microBatchSize": 3}}, "leave it out to let the plan choose", id="micro-batch"),
        pytest.param({"training": {"keep": "best"}}, "set spec.training.evaluateEvery", id="best-of-nothing"),
        pytest.param({"training": {"earlyStopping": {}}}, "set spec.training.evaluateEvery", id="patience"),
        pytest.param({"lora": {"targets": ["all-linear", "q_proj"]}}, "list it alone", id="all-linear"),
        pytest.param(
            {"evaluation": {"generations": 0, "gate": {"minRougeL": 0.1}}}, "set it to 1 or more", id="gate-answers"
        ),
        pytest.param(
            {"resources": {"gpuResource": "nvidia.com/mig-1g.10gb", "gpusPerNode": 2}},
            "MIG partitions cannot train together; set nodes and gpusPerNode to 1",
            id="partitions",
        ),
        pytest.param({"lora": {"init": "pissa"}}, "quantization.bits is 4; set spec.method to lora", id="pissa-4"),
        pytest.param(
            {"method": "lora", "quantization": {"bits": 16}, "lora": {"init": "pissa", "dora": True}},
            "leave those false",
            id="pissa-dora",
        ),
        pytest.param({"quantization": {"bits": 8}, "lora": {"init": "loftq"}}, "is for 4 bits", id="loftq-8"),
        pytest.param(
            {"method": "full", "quantization": {"bits": 16}, "output": {"uri": "s3://adapters/b", "merged": "bf16"}},
            "leave it out",
            id="full-merged",
        ),
        pytest.param({"quantization": {"bits": 8}, "lora": {"dora": True}}, "fails on an 8-bit base", id="dora-8"),
        pytest.param(
            {"lora": {"init": "loftq"}, "output": {"uri": "s3://adapters/b", "merged": "bf16"}},
            "the original base does not have; set it to dequantised",
            id="loftq-merged",
        ),
        pytest.param({"model": {"uri": "file:///m"}}, "spec.model.uri is file:///m", id="model"),
        pytest.param({"dataset": {"uri": "file:///d"}}, "spec.dataset.uri is file:///d", id="dataset"),
        pytest.param(
            {"dataset": {"evaluation": {"uri": "file:///e"}}}, "spec.dataset.evaluation.uri is file:///e", id="held-out"
        ),
        pytest.param(
            {"dataset": {"uri": None, "sources": [{"uri": "s3://data/a.csv"}, {"uri": "file:///b.csv"}]}},
            "spec.dataset.sources[1].uri is file:///b.csv",
            id="source",
        ),
        pytest.param({"dataset": {"uri": None}}, "spec.dataset has neither uri nor sources; give one", id="no-rows"),
        pytest.param(
            {"dataset": {"sources": [{"uri": "s3://data/a.csv"}]}}, "spec.dataset has both uri and sources", id="both"
        ),
        pytest.param(
            {"dataset": {"uri": None, "sources": [{"uri": "s3://data/a.csv"}], "maxSamples": 9}},
            "spec.dataset.maxSamples cannot be combined with sources; set maxSamples in each source",
            id="samples",
        ),
        pytest.param(
            {"dataset": {"format": "chat", "template": {"prompt": "{a}", "answer": "{b}"}}},
            "spec.dataset.format is chat; leave format out, or remove the template",
            id="template",
        ),
        pytest.param({"output": {"uri": "file:///o"}}, "spec.output.uri is file:///o", id="output"),
    ],
)
def test_violation(change: dict[str, Any], sentence: str) -> None:
    [violation] = check(make_spec(**change))
    assert sentence in violation.message


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"method": "lora", "quantization": {"bits": 16}},
        {"method": "full", "quantization": {"bits": 16}},
        {"quantization": {"bits": 8}},
        {"lora": {"init": "loftq", "rslora": True}},
        {"method": "lora", "quantization": {"bits": 16}, "lora": {"init": "pissa"}},
        {"training": {"microBatchSize": 4}},
        {"training": {"evaluateEvery": 10, "keep": "best", "earlyStopping": {"patience": 2}}},
        {"evaluation": {"generations": 0, "gate": {"maxLoss": 3}}},
    ],
)
def test_no_violation(change: dict[str, Any]) -> None:
    assert check(make_spec(**change)) == ()


def test_local_files_are_valid_without_cluster() -> None:
    assert check(make_spec(output={"uri": "file:///o"}), COMMON_RULES) == ()


def test_claims_are_invalid_without_cluster() -> None:
    spec = make_spec(dataset={"uri": "pvc://rows/train.jsonl"})
    assert check(spec) == ()
    [violation] = check(spec, LOCAL_RULES)
    assert violation.message.startswith(
        "spec.dataset.uri is pvc://rows/train.jsonl, and only a cluster can mount a PVC"
    )
