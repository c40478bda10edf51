"""Any manifest, message, report or configuration is parsed, or refused with the error that its reader names."""

import contextlib
import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter, ValidationError

from qlora_api.logs.formatters import time_of
from qlora_api.model_config import MAX_CONFIG, SIZE_KEYS, reduce_config
from qlora_api.prepared import PinnedTasks, Prepared
from qlora_api.progress import ProgressReport
from qlora_api.reasons import Reason
from qlora_api.report import AdapterRecord, EvaluatedRow, MergedManifest, ResultManifest, RunReport, TerminationMessage
from qlora_api.untrusted_json import InvalidJsonError, parse_object
from qlora_api.v1alpha1 import to_timedelta
from qlora_api.v1alpha1.types import Duration
from qlora_cli.manifests.loader import ManifestError, parse_manifest
from qlora_cli.manifests.yaml_documents import YamlError, parse_documents, parse_value
from qlora_cli.podlogs.lines import parse_line
from qlora_operator.lifecycle.termination import parse_termination_message
from qlora_planner import make_plan
from qlora_planner.gpu_inventory import GpuPool
from qlora_planner.models.families import FAMILIES, read_recorded_shape
from qlora_planner.models.shapes import MismatchError, UnknownModelError
from qlora_planner.offline import make_offline_plan
from qlora_planner.quantities import parse_quantity
from qlora_planner.sizing import DoesNotFitError
from qlora_planner.validation import CLUSTER_RULES
from tests.make import PREPARED_MESSAGE, PUBLISHED_MESSAGE, make_manifest, make_prepared, make_spec
from tests.unit.security.fuzzing import NUMBERS, SCALARS, changed, json_objects, json_text, json_values, mutations

MODELS = [AdapterRecord, EvaluatedRow, MergedManifest, PinnedTasks, Prepared, ProgressReport, ResultManifest, RunReport]
MESSAGES = [json.loads(message) for message in (PREPARED_MESSAGE, PUBLISHED_MESSAGE)]
TEXTS = st.one_of(json_values().map(json_text), *(mutations(message.encode()) for message in (PREPARED_MESSAGE,)))


@given(model=st.sampled_from([*MODELS, TerminationMessage]), content=TEXTS)
def test_model_of_the_contract_is_valid_or_refused(model: type[BaseModel], content: Any):
    with contextlib.suppress(ValidationError):
        model.model_validate_json(content)


@given(message=st.sampled_from(MESSAGES).flatmap(changed))
def test_termination_message_is_parsed_or_none(message):
    parsed = parse_termination_message(json_text(message))
    assert parsed is None or isinstance(parsed.reason, Reason)


@given(config=st.one_of(json_objects(*sorted(SIZE_KEYS)), json_objects(*sorted(SIZE_KEYS), value=NUMBERS | SCALARS)))
def test_config_is_reduced_within_its_bound(config):
    assert len(reduce_config(config)) <= MAX_CONFIG


SHAPES = st.one_of(
    json_objects(*sorted(SIZE_KEYS)), st.dictionaries(st.sampled_from(sorted(SIZE_KEYS)), NUMBERS, max_size=3)
)


@given(family=st.sampled_from(sorted(FAMILIES)), config=SHAPES)
@example(family="llama", config={"num_attention_heads": 4096, "hidden_size": 64})
@example(family="phi", config={"partial_rotary_factor": float("nan")})
@example(family="gpt_neox", config={"rotary_pct": float("inf")})
@example(family="qwen2", config={"use_sliding_window": True, "max_window_layers": -(10**30)})
def test_plan_of_any_config_is_made_or_refused(family, config):
    spec = make_spec(resources={"gpusPerNode": 1, "gpuProduct": "NVIDIA-A100-SXM4-80GB"})
    with contextlib.suppress(UnknownModelError, DoesNotFitError, MismatchError):
        plan = make_offline_plan(spec, config | {"model_type": family})
        assert 0 < plan.sizing.estimate.peak < 2**50


@given(text=st.text(max_size=MAX_CONFIG + 1) | json_values().map(json_text))
def test_recorded_config_is_read_or_unknown(text):
    with contextlib.suppress(UnknownModelError):
        assert read_recorded_shape(text).parameters > 0


TRACED_SIZES = (
    b'{"model_type":"new","traced":{"version":1,"embedding":"wte","head":"lm_head","fp32":3,"skipped":"up",'
    b'"modules":":wte=50,lm_head=10x5;h.0-1:up|down=20x5qa,norm=5","experts":"h.0-1:e=9x9"}}'
)


@given(text=mutations(TRACED_SIZES))
@example(text=TRACED_SIZES)
@example(text=TRACED_SIZES.replace(b"h.0-1:", b"h.0-99999:"))
@example(text=TRACED_SIZES.replace(b"20x5", b"99999999999999x99999999999999"))
def test_plan_of_any_recorded_sizes_is_made_or_refused(text):
    prepared, pool = make_prepared(), GpuPool("NVIDIA-A10", 23_028 << 20, 1, 1, (8, 6))
    model = prepared.model.model_copy(update={"config": text.decode(errors="replace")})
    spec = make_spec(resources={"gpusPerNode": 1}, lora={"targets": ["all-linear"], "dropout": 0})
    with contextlib.suppress(DoesNotFitError, MismatchError):
        plan = make_plan(spec, prepared.model_copy(update={"model": model}), (pool,))
        assert any("peak memory is not estimated" in reason for reason in plan.reasons)


@given(content=mutations(b'{"model_type": "llama", "num_hidden_layers": 2}') | json_values().map(json_text))
def test_json_object_is_parsed_or_refused(content):
    with contextlib.suppress(InvalidJsonError):
        assert isinstance(parse_object(content, 10_000), dict)


def check_manifest(text: str) -> None:
    with contextlib.suppress(YamlError, ManifestError):
        for document in parse_documents(text, "job.yaml"):
            parse_manifest(document, CLUSTER_RULES)


MANIFEST = make_manifest()


@given(manifest=changed(MANIFEST))
def test_manifest_with_a_changed_part_is_valid_or_refused(manifest):
    check_manifest(json_text(manifest))


YAML_FRAGMENTS = st.sampled_from(
    ["&a ", "*a", "!!binary ", "!!set ", "!!timestamp ", "!!python/object:os.system ", "? ", "- ", ": ", "\n", "|", "{",
     "}", "[", "]", "0x1F", "1_000", "1:30", ".inf", ".nan", "9" * 5000, "2026-01-01", "~", "<<: ", "%YAML 9.9\n",
     "---\n", "'"]
)  # fmt: skip
KNOWN = st.sampled_from(
    ["apiVersion: qlora.dev/v1alpha1", "kind: QLoRAJob", "metadata: {name: a}", "spec: ", "name", "a"]
)


@given(parts=st.lists(YAML_FRAGMENTS | KNOWN | st.text(max_size=5), max_size=12))
@example(parts=["a: ", "9" * 5000])
@example(parts=["kind: QLoRAJob\nspec: !!binary aGVsbG8="])
@example(parts=["kind: QLoRAJob\n? [1, 2]\n: a"])
@example(parts=["kind: QLoRAJob\nspec: !!set {a, b}"])
@example(parts=["kind: QLoRAJob\nspec: !!timestamp 2026-13-45"])
@example(
    parts=[
        "kind: QLoRAJob\n",
        *(
            f"a{level + 1}: &a{level + 1} [{', '.join([f'*a{level}'] * 9)}]\n" if level else "a1: &a1 [x]\n"
            for level in range(12)
        ),
    ]
)
@example(parts=["[" * 5000])
@example(parts=["&a [*a]"])
def test_yaml_is_a_manifest_or_refused(parts):
    check_manifest("".join(parts))


@given(text=st.text(max_size=20) | YAML_FRAGMENTS)
@example(text="9" * 5000)
def test_value_of_an_option_is_parsed_or_refused(text):
    with contextlib.suppress(YamlError):
        parse_value(text)


@given(text=st.text(max_size=20) | st.from_regex(r"[0-9.]{1,400}(Ki|Mi|Gi|Ti|k|M|G|e9)?", fullmatch=True))
@example(text="9" * 400 + "Gi")
def test_quantity_is_parsed_or_refused(text):
    with contextlib.suppress(ValueError):
        assert parse_quantity(text) >= 0


@given(text=st.text(max_size=10) | st.from_regex(r"[0-9]{1,8}[smhd]", fullmatch=True))
@example(text="9999999d")
def test_duration_is_parsed_or_refused(text):
    with contextlib.suppress(ValidationError):
        assert to_timedelta(TypeAdapter(Duration).validate_python(text)).total_seconds() > 0


LINES = st.one_of(
    json_values(st.sampled_from(["message", "time", "rank", "level"])).map(json_text), st.text(max_size=50)
)


@given(line=LINES | json_objects("message", "time", "rank", "level", "exception").map(json_text))
@example(line="[" * 100_000)
@example(line="9" * 5000)
@example(line='{"message": 1, "rank": 1e999}')
@example(line='{"message": "a", "exception": {}}')
def test_log_line_is_formatted_whatever_it_is(line):
    assert isinstance(parse_line(line).text, str)
    assert isinstance(time_of(line), str)


@pytest.mark.parametrize("content", [b"[" * 100_000, b"9" * 5000, b"\xff", b"", b"1e999"])
@pytest.mark.parametrize("model", [*MODELS, TerminationMessage])
def test_models_refuse_what_is_no_object(model, content):
    with pytest.raises(ValidationError):
        model.model_validate_json(content)
