"""The digest of a result: stable for existing manifests, and dependent on every field that determines it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from pydantic import BaseModel

from qlora_api.v1alpha1 import DataStatus, ModelStatus, QLoRAJobSpec
from qlora_trainer import result_digest as digest
from qlora_trainer.model.adapter import resolve_adapter
from qlora_trainer.model.architecture import build_empty
from qlora_trainer.result_digest import LEFT_OUT, ResolvedSpec, result_digest
from tests.make import make_spec
from tests.unit.trainer.tiny import write_model

QUICKSTART: Final = {
    "lora": {"rank": 16, "targets": ["all-linear"]},
    "training": {"maxSteps": 60, "globalBatchSize": 8, "learningRate": 4.0e-4},
}
"""The fields of examples/quickstart/job.yaml that determine its result."""
BASE: Final = {"quantization": {"bits": 16}, "method": "lora"}
"""A base that is not quantized."""
TWO_NODES: Final = {"resources": {"nodes": 2, "gpusPerNode": 4}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_model(folder)
    return folder


@pytest.fixture
def empty(folder) -> Any:
    """A model without weights; peft modifies the model that it is given, so each test needs its own."""
    return build_empty(folder)


def digest_of(spec: QLoRAJobSpec, empty: Any, **resolved: Any) -> str:
    """The digest of a spec, on the same model and the same rows each time."""
    model = ModelStatus(uri=spec.model.uri, commit="a" * 40, architecture="LlamaForCausalLM", parameters=134_515_008)
    data = DataStatus(
        digest="b" * 64,
        format="instruction",
        training_rows=950,
        evaluation_rows=50,
        training_tokens=35_150,
        truncated_rows=0,
        longest_row_tokens=212,
    )
    if "adapter" not in resolved:
        resolved["adapter"] = {} if spec.method == "full" else resolve_adapter(empty, spec.lora)
    defaults = {"model": model, "dataset": data, "rows_digest": "c" * 64, "chat_template": None}
    return result_digest(spec, ResolvedSpec(**{**defaults, **resolved}))


PINNED: Final[tuple[tuple[str, dict[str, Any], str], ...]] = (
    ("defaults", {}, "2c0fa6f2e8edf9ec"),
    ("quickstart", QUICKSTART, "a6a4862e292fd2b5"),
    (
        "patterns",
        {"lora": {"rank": 8, "alpha": 8, "rankPattern": {"v_proj": 4}, "alphaPattern": {"q_proj": 3}}},
        "93f896996e96dfb1",
    ),
    ("all-linear", {"lora": {"targets": ["all-linear"], "dropout": 0, "rslora": True}}, "c216c7ac0138bb63"),
    ("dora", {"lora": {"dora": True, "rank": 4}}, "bd0330eefa8090b7"),
    (
        "loftq",
        {"lora": {"init": "loftq"}, "output": {"merged": "bf16", "mergeBase": "dequantised"}},
        "092a1d8b2d91974b",
    ),
    ("pissa", {**BASE, "lora": {"init": "pissa"}}, "24f949888a41df27"),
    (
        "modules-to-save",
        {"lora": {"modulesToSave": ["lm_head"]}, "evaluation": {"tasks": ["arc_easy"]}},
        "da68c4ac6eedfc10",
    ),
    ("gaussian", {"lora": {"init": "gaussian"}, "training": {"neftuneAlpha": 5}}, "cbfba00484fcf76f"),
    ("full", {"method": "full", "quantization": {"bits": 16}, "training": {"learningRate": 2e-5}}, "3c7fc04867e22824"),
    (
        "full-8bit",
        {"method": "full", "quantization": {"bits": 16}, "training": {"optimizer": "adamw8bit"}},
        "10b3a67383f728c2",
    ),
    ("8-bits", {"quantization": {"bits": 8, "type": "fp4"}}, "89b1a7d566f178f5"),
    ("fp4", {"quantization": {"type": "fp4", "doubleQuant": False}}, "a2da3be89d588c98"),
    ("zero3", {**TWO_NODES, "distribution": "zero3", "training": {"optimizer": "adamw"}}, "2c0fa6f2e8edf9ec"),
    ("paged", {**TWO_NODES, "distribution": "ddp", "training": {"optimizer": "pagedAdamw8bit"}}, "af5bc06253a30883"),
    (
        "early-stopping",
        {"training": {"evaluateEvery": 10, "earlyStopping": {"patience": 2, "minDelta": 0.01}, "keep": "best"}},
        "4525a0db5b2be3a2",
    ),
    ("validation-only", {"training": {"evaluateEvery": 10, "keep": "last", "seed": 7}}, "7a7ca3fed4800788"),
    (
        "steps",
        {"training": {"maxSteps": 50, "globalBatchSize": 4, "warmupRatio": 0.1, "scheduler": "linear"}},
        "162eb46647d47719",
    ),
    ("rows", {"training": {"maxLength": 512, "longRows": "drop", "packing": False, "loss": "all"}}, "2c0fa6f2e8edf9ec"),
    (
        "template",
        {"dataset": {"template": {"prompt": "Q: {question}\nA:", "answer": " {answer}"}, "maxSamples": 100}},
        "2c0fa6f2e8edf9ec",
    ),
    (
        "weights",
        {
            "dataset": {
                "uri": None,
                "sources": [{"uri": "s3://data/b.jsonl", "weight": 2}, {"uri": "s3://data/c.jsonl"}],
            }
        },
        "2c0fa6f2e8edf9ec",
    ),
    (
        "fields-not-in-the-digest",
        {"model": {"revision": "v1.0"}, "deadlines": {"total": "1h"}, "queue": {"name": "team"}, "ttl": "1h"},
        "2c0fa6f2e8edf9ec",
    ),
)
"""Digests of version 0.1.0, which listed the fields one by one."""


@pytest.mark.parametrize(("changes", "pinned"), [pytest.param(*case[1:], id=case[0]) for case in PINNED])
def test_digest_of_a_manifest_is_stable(monkeypatch, empty, changes, pinned):
    monkeypatch.setattr(digest, "__version__", "0.1.0")
    assert digest_of(make_spec(**changes), empty) == pinned


def test_digest_with_a_chat_template_is_stable(monkeypatch, empty):
    monkeypatch.setattr(digest, "__version__", "0.1.0")
    assert digest_of(make_spec(), empty, chat_template="{{ messages }}") == "9396b5269166fc47"


def fields_of(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The path of every field of a spec, nested ones included."""
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel) and f"{prefix}{name}" not in LEFT_OUT:
            yield from fields_of(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


FIELDS: Final = tuple(fields_of(QLoRAJobSpec))


def test_every_field_outside_the_digest_exists_and_has_a_reason():
    assert set(LEFT_OUT) <= set(FIELDS)
    assert all(reason.strip() for reason in LEFT_OUT.values())


def another(value: Any) -> Any:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return f"{value}-2"
    return 7 if value is None else {**value, "x": 1} if isinstance(value, dict) else (*value, "x")


def with_another(block: BaseModel, path: str) -> Any:
    """The block with another value of one field, valid or not."""
    name, _, rest = path.partition(".")
    value = getattr(block, name)
    return block.model_copy(update={name: with_another(value, rest) if rest else another(value)})


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings:UserWarning")
@pytest.mark.parametrize("path", [path for path in FIELDS if path not in LEFT_OUT])
def test_every_other_field_is_in_the_digest(empty, path):
    # With keep: best, even the number of validations affects the result.
    spec = make_spec(training={"evaluateEvery": 10, "keep": "best"})
    adapter = resolve_adapter(empty, spec.lora)
    assert digest_of(with_another(spec, path), empty, adapter=adapter) != digest_of(spec, empty, adapter=adapter)
