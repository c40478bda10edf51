from pathlib import Path

import pytest

from qlora_cli.manifests.loader import ManifestError, parse_manifest
from qlora_cli.manifests.overrides import Override, OverrideError, apply_overrides, parse_override
from qlora_cli.manifests.yaml_documents import YamlError, parse_documents
from qlora_planner.validation import COMMON_RULES
from tests.unit.cli.make import JOB

HERE = Path.cwd()


@pytest.mark.parametrize(
    ("text", "location", "value"),
    [
        ("lora.rank=8", ("spec", "lora", "rank"), 8),
        ("spec.lora.rank=8", ("spec", "lora", "rank"), 8),
        ("lora.targets=[q_proj, v_proj]", ("spec", "lora", "targets"), ["q_proj", "v_proj"]),
        ("training.learningRate=4e-4", ("spec", "training", "learningRate"), 4e-4),
        ("training.packing=false", ("spec", "training", "packing"), False),
        ("resources.gpuProduct=", ("spec", "resources", "gpuProduct"), None),
        ("output.uri=./out", ("spec", "output", "uri"), f"file://{HERE}/out"),
        ("output.uri=/a b/out", ("spec", "output", "uri"), "file:///a%20b/out"),
        ("output.uri=s3://bucket/a=b", ("spec", "output", "uri"), "s3://bucket/a=b"),
        ("dataset.evaluation.uri=x.jsonl", ("spec", "dataset", "evaluation", "uri"), f"file://{HERE}/x.jsonl"),
    ],
)
def test_override_has_location_and_value(text, location, value):
    assert parse_override(text) == Override(location, value)


@pytest.mark.parametrize("text", ["lora.rank", "=8", "lora..rank=8", "spec.=8", ""])
def test_override_without_path_or_value_is_rejected(text):
    with pytest.raises(OverrideError, match="write --set path=value"):
        parse_override(text)


def test_override_with_invalid_yaml_is_rejected():
    with pytest.raises(YamlError, match="is not YAML"):
        parse_override("lora.targets=[q_proj")


def parse(*changes: str):
    (document,) = parse_documents(JOB, "job.yaml")
    return parse_manifest(apply_overrides(document, [parse_override(change) for change in changes]), COMMON_RULES).spec


def test_overrides_change_the_spec_and_nothing_else():
    assert parse("lora.rank=8", "training.maxSteps=3") == parse().model_copy(
        update={
            "lora": parse().lora.model_copy(update={"rank": 8}),
            "training": parse().training.model_copy(update={"max_steps": 3}),
        }
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("lora.rnk=8", "--set: spec.lora.rnk: unknown field; did you mean rank?"),
        ("lorra.rank=8", "--set: spec.lorra: unknown field; did you mean lora?"),
        ("lora.rank=0", "--set: spec.lora.rank: must be ≥ 1, got 0"),
        ("training.maxSteps=0", "--set: spec.training.maxSteps: must be ≥ 1, got 0"),
    ],
)
def test_invalid_override_is_reported_at_the_option(change, message):
    with pytest.raises(ManifestError) as caught:
        parse(change)
    assert str(caught.value) == message


def test_override_below_a_scalar_is_rejected():
    with pytest.raises(OverrideError, match=r"spec\.lora\.rank has no fields"):
        parse("lora.rank.size=8")


def test_float_without_fraction_is_an_integer_as_for_kubectl():
    [override] = [parse_override("training.maxSteps=1e3")]
    assert repr(override.value) == "1000"
