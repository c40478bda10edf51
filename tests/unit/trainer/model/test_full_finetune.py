"""Method full: trains every weight in fp32 and publishes a model that loads without its base."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qlora_api.reasons import Reason
from qlora_api.report import RunReport
from qlora_api.v1alpha1 import QuantizationSpec
from qlora_trainer.data.batching import collate
from qlora_trainer.errors import RunError
from qlora_trainer.evaluation.evaluator import compute_metrics
from qlora_trainer.model.base_model import load_base, prepare_full_finetune
from qlora_trainer.model.optimizer import OptimizerKind
from qlora_trainer.prepare import prepare
from qlora_trainer.publishing.publish import write_weights
from qlora_trainer.run import run
from tests.unit.trainer.tiny import (
    CPU,
    RecordingSink,
    instruction_rows,
    make_spec,
    make_tokenizer,
    prepare_config,
    run_config,
    write_model,
    write_rows,
)
from tests.unit.trainer.tuned import SETTINGS, make_record, make_test_loop, run_steps, token_rows, weights_of

FULL = {"method": "full", "quantization": {"bits": 16}, "training": {"learningRate": 0.001}}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_model(path, tie_word_embeddings=request.param)
    return path


def trainable_on(folder: Path, dtype: torch.dtype = torch.float32, *, checkpointing: bool = False):
    base = load_base(folder, QuantizationSpec(bits=16), torch.float32, "sdpa", "cpu")
    return prepare_full_finetune(base, dataclasses.replace(SETTINGS, dtype=dtype, gradient_checkpointing=checkpointing))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_finetune_trains_every_weight_in_fp32(folder, dtype):
    trainable, rows = trainable_on(folder, dtype), token_rows(16)
    assert {weight.dtype for weight in trainable.parameters()} == {torch.float32}
    assert len(trainable.parameters()) == len(list(trainable.model.parameters()))
    before = weights_of(trainable)
    history = run_steps(make_test_loop(trainable, rows, steps=6, learning_rate=0.002))
    assert history[-1].loss < history[0].loss
    assert not any(torch.equal(one, other) for one, other in zip(before, weights_of(trainable), strict=True))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_full_finetune_gradients_equal_those_of_plain_transformers(folder, checkpointing):
    trainable, batch = trainable_on(folder, checkpointing=checkpointing), collate(token_rows(4), CPU, packing=True)
    trainable.wrapped.train()
    trainable.loss_sum(batch, torch.ones(())).backward()
    plain = trainable_on(folder).model
    logits = plain(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits[0]
    torch.nn.functional.cross_entropy(logits[batch.label_positions], batch.labels, reduction="sum").backward()
    for one, other in zip(trainable.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-4)


def test_full_model_is_saved_in_base_dtype_with_base_uri(folder, tmp_path):
    trainable, rows = trainable_on(folder), token_rows(8)
    run_steps(make_test_loop(trainable, rows, learning_rate=0.002))
    with trainable.evaluating():
        expected = compute_metrics(trainable, rows, 4, packing=True).loss
    target = write_weights(trainable, make_tokenizer(), make_record(folder, "full"), tmp_path)
    assert target.name == "model"
    stored = load_file(target / "model.safetensors")
    assert {weight.dtype for weight in stored.values()} == {torch.bfloat16}
    assert ("lm_head.weight" in stored) != trainable.model.config.tie_word_embeddings
    assert json.loads((target / "config.json").read_text())["_name_or_path"] == f"file://{folder}"
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    reloaded = dataclasses.replace(trainable, wrapped=model, model=model)
    with reloaded.evaluating():
        assert compute_metrics(reloaded, rows, 4, packing=True).loss == pytest.approx(expected, rel=0.01)


def test_full_finetune_run_publishes_a_loadable_model(tmp_path):
    model, rows = write_model(tmp_path / "base"), write_rows(tmp_path / "rows.jsonl", instruction_rows())
    spec = make_spec(model, rows, f"file://{tmp_path / 'output'}", **FULL)
    prepared = prepare(prepare_config(spec), work=tmp_path / "work")
    result = run(run_config(spec, prepared), RecordingSink(), work=tmp_path / "work")
    assert result.adapter == f"{prepared.prefix}/model"
    assert result.evaluation.adapter.loss < result.evaluation.base.loss
    folder = Path(result.adapter.removeprefix("file://"))
    assert not (folder / "adapter_config.json").exists()
    assert "AutoModelForCausalLM.from_pretrained" in (folder / "README.md").read_text()
    report = RunReport.model_validate_json((folder.parent / "report/report.json").read_text())
    assert report.choices["optimizer"].startswith(f"{OptimizerKind.ADAMW}: its fp32 state fits")


def test_lora_settings_do_not_change_the_digest_of_full_finetune(folder, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", instruction_rows())
    specs = [
        make_spec(f"file://{folder}", rows, f"file://{tmp_path}", **FULL | {"lora": {"rank": rank}}) for rank in (4, 8)
    ]
    first, second = (prepare(prepare_config(spec), work=tmp_path / "work").digest for spec in specs)
    assert first == second


def test_prepare_refuses_full_finetune_beyond_parameter_limit(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("qlora_trainer.model.full_finetune.MAX_PARAMETERS", 1000)
    rows = write_rows(tmp_path / "rows.jsonl", instruction_rows())
    spec = make_spec(f"file://{folder}", rows, f"file://{tmp_path}", **FULL)
    with pytest.raises(RunError, match="full supports 1,000 at most") as caught:
        prepare(prepare_config(spec), work=tmp_path / "work")
    assert caught.value.reason == Reason.INVALID_SPEC
