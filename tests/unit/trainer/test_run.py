"""A whole run on a tiny model: prepare, train, publish, and load the adapter as its users do."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qlora_api.names import Phase
from qlora_api.report import Manifest, RunReport
from qlora_api.v1alpha1 import QLoRAJobSpec
from qlora_trainer import shards, stages
from qlora_trainer.prepare import prepare
from qlora_trainer.run import run
from tests.unit.trainer.tiny import (
    RecordingSink,
    instruction_rows,
    make_spec,
    prepare_config,
    run_config,
    write_model,
    write_rows,
)


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> QLoRAJobSpec:
    folder = tmp_path_factory.mktemp("run")
    return make_spec(
        write_model(folder / "model"),
        write_rows(folder / "rows.jsonl", instruction_rows()),
        f"file://{folder / 'output'}",
    )


@pytest.fixture(scope="module")
def published(spec: QLoRAJobSpec, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RecordingSink]:
    work = tmp_path_factory.mktemp("work")
    prepared = prepare(prepare_config(spec), work=work)
    sink = RecordingSink()
    run(run_config(spec, prepared), sink, work=work)
    return Path(prepared.prefix.removeprefix("file://")), sink


def test_everything_the_manifest_lists_is_there_and_intact(published):
    folder, _ = published
    manifest = Manifest.model_validate_json((folder / "manifest.json").read_text())
    assert {file.path for file in manifest.files} >= {
        "adapter/adapter_model.safetensors",
        "adapter/adapter_config.json",
        "adapter/tokenizer.json",
        "report/report.json",
        "report/report.html",
        "report/loss.png",
    }
    for file in manifest.files:
        content = (folder / file.path).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (file.size, file.sha256), file.path
    assert json.loads((folder.parent / "latest.json").read_text())["digest"] == manifest.digest


def test_adapter_loads_in_peft_with_the_loss_of_the_report(published, spec):
    folder, _ = published
    report = RunReport.model_validate_json((folder / "report/report.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(spec.model.uri.removeprefix("file://"), dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folder / "adapter").eval()
    total, count = 0.0, 0
    for row in shards.from_parquet((folder / shards.EVALUATION).read_bytes()):
        ids = torch.tensor([row.input_ids])
        ((start, end),) = row.learned
        with torch.no_grad():
            logits = model(ids).logits[0, start - 1 : end - 1]
        wanted = ids[0, start:end]
        total += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
        count += len(wanted)
    assert count == report.evaluation.tokens
    # The report's base has 4-bit weights, this one 32-bit ones.
    assert total / count == pytest.approx(report.evaluation.adapter.loss, rel=0.05)
    assert report.evaluation.adapter.loss < report.evaluation.base.loss


def test_progress_passes_through_the_phases_and_ends_at_100_percent(published):
    _, sink = published
    phases = list(dict.fromkeys(progress.phase for progress in sink.seen))
    assert phases == [Phase.TRAINING, Phase.EVALUATING, Phase.PUBLISHING]
    assert [progress.percent for progress in sink.seen if progress.phase == Phase.TRAINING][-1] == 100
    assert sink.seen[-1].step == 4


def test_a_second_prepare_finds_the_result(published, spec, tmp_path):
    folder, _ = published
    prepared = prepare(prepare_config(spec), work=tmp_path)
    assert prepared.published == Manifest.model_validate_json((folder / "manifest.json").read_text()).result


def test_the_same_digest_gives_bit_identical_adapters(published, spec, tmp_path, monkeypatch):
    folder, _ = published
    monkeypatch.setattr(stages, "load_in_fresh_process", lambda *_: None)  # the first run was checked
    again = spec.model_copy(update={"output": spec.output.model_copy(update={"uri": f"file://{tmp_path / 'output'}"})})
    prepared = prepare(prepare_config(again), work=tmp_path)
    run(run_config(again, prepared), RecordingSink(), work=tmp_path)
    assert prepared.digest == folder.name
    first = load_file(folder / "adapter/adapter_model.safetensors")
    second = load_file(tmp_path / "output/colours" / prepared.digest / "adapter/adapter_model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
