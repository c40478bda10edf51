"""A complete run on a tiny model: prepare, train, publish, and load the adapter with its public API."""

import ast
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import load_file

from qlora_api.names import Phase
from qlora_api.reasons import Reason
from qlora_api.report import (
    EvaluatedRow,
    MergedManifest,
    ResultManifest,
    RunReport,
    ServingCheck,
    TaskScore,
    ValidationRecord,
)
from qlora_api.v1alpha1 import QLoRAJobSpec
from qlora_trainer import stages
from qlora_trainer.errors import RunError
from qlora_trainer.prepare import prepare
from qlora_trainer.publishing.html_report import render_html
from qlora_trainer.publishing.plots import draw_plots
from qlora_trainer.run import run
from qlora_trainer.runtime.metrics import METER
from tests.unit.trainer.tiny import (
    RecordingSink,
    prepare_config,
    run_config,
    write_job,
)

RECOMPUTE = Path(__file__).with_name("recompute.py")


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> QLoRAJobSpec:
    return write_job(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def published(spec: QLoRAJobSpec, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RecordingSink]:
    work = tmp_path_factory.mktemp("work")
    prepared = prepare(prepare_config(spec), work=work)
    sink = RecordingSink()
    run(run_config(spec, prepared), sink, work=work)
    sink.metrics = METER.render().decode()
    return Path(prepared.prefix.removeprefix("file://")), sink


def test_every_file_of_the_manifest_exists_and_matches_its_checksum(published):
    folder, _ = published
    manifest = ResultManifest.model_validate_json((folder / "manifest.json").read_text())
    assert {file.path for file in manifest.files} >= {
        "adapter/adapter_model.safetensors",
        "adapter/adapter_config.json",
        "adapter/tokenizer.json",
        "adapter/README.md",
        "adapter/qlora.json",
        "report/report.json",
        "report/report.html",
        "report/evaluation.jsonl",
        "report/loss.png",
        "report/tensorboard/events.out.tfevents.qlora",
    }
    for file in manifest.files:
        content = (folder / file.path).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (file.size, file.sha256), file.path
    assert json.loads((folder.parent / "latest.json").read_text())["digest"] == manifest.digest


def test_independent_script_recomputes_the_published_metrics(published, spec):
    folder, _ = published
    base = spec.model.uri.removeprefix("file://")
    found = json.loads(
        subprocess.run([sys.executable, RECOMPUTE, folder, base], capture_output=True, text=True, check=True).stdout
    )
    report = json.loads((folder / "report/report.json").read_text())
    assert flat(found["evaluation"]) == pytest.approx(flat(report["evaluation"]), rel=1e-12)
    intervals = {side: report["confidence"][side] for side in ("base", "adapter", "change")}
    assert flat(found["confidence"]) == pytest.approx(flat(intervals), rel=1e-12)
    # Measured in fp32, one row at a time; the run computes in bf16 if the CPU supports it.
    for side in ("base", "adapter"):
        assert found["measured"][side] == pytest.approx(report["evaluation"][side]["loss"], rel=0.01), side
    assert report["evaluation"]["adapter"]["loss"] < report["evaluation"]["base"]["loss"]
    assert report["evaluation"]["answers"] == len(report["samples"]) == 2


def flat(tree: dict, path: str = "") -> dict[str, float]:
    """Numbers by their path."""
    found: dict[str, float] = {}
    for name, value in tree.items():
        found |= flat(value, f"{path}.{name}") if isinstance(value, dict) else {f"{path}.{name}": value}
    return found


def test_recompute_script_imports_nothing_of_the_project():
    imported = {
        name.name.partition(".")[0]
        for node in ast.walk(ast.parse(RECOMPUTE.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([ast.alias(node.module or "")] if isinstance(node, ast.ImportFrom) else node.names)
    }
    assert imported == {
        "hashlib",
        "json",
        "math",
        "re",
        "sys",
        "pathlib",
        "numpy",
        "torch",
        "peft",
        "pyarrow",
        "transformers",
    }


def test_card_has_the_metrics_and_the_load_commands(published, spec):
    folder, _ = published
    text = (folder / "adapter/README.md").read_text()
    report = RunReport.model_validate_json((folder / "report/report.json").read_text())
    front = yaml.safe_load(text.split("---")[1])
    assert front == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "qlora", "qlora-operator"],
    }
    change, interval = report.evaluation.adapter.loss - report.evaluation.base.loss, report.confidence.change.loss
    assert f"| {change:+.3f} ({interval.low:+.3f} to {interval.high:+.3f}) |" in text
    base = spec.model.uri.removeprefix("file://")
    assert f"vllm serve {base} --enable-lora --max-lora-rank 8 --lora-modules colours=" in text
    assert "### Instruction:" in text
    assert report.serving == ServingCheck(vllm=True, problems=(), max_lora_rank=8)


def test_progress_passes_through_the_phases_and_ends_at_100_percent(published):
    _, sink = published
    phases = list(dict.fromkeys(progress.phase for progress in sink.seen))
    assert phases == [Phase.TRAINING, Phase.EVALUATING, Phase.PUBLISHING]
    assert [progress.percent for progress in sink.seen if progress.phase == Phase.TRAINING][-1] == 100
    assert sink.seen[-1].step == 4


def test_prometheus_metrics_equal_the_report(published):
    folder, sink = published
    last = RunReport.model_validate_json((folder / "report/report.json").read_text()).history[-1]
    metrics = {
        sample.name: sample.value
        for family in text_string_to_metric_families(sink.metrics)
        for sample in family.samples
        if not sample.labels
    }
    assert (metrics["qlora_trainer_step"], metrics["qlora_trainer_planned_steps"]) == (4, 4)
    assert metrics["qlora_trainer_loss"] == last.loss
    assert metrics["qlora_trainer_learning_rate"] == last.learning_rate
    assert metrics["qlora_trainer_gradient_norm"] == last.grad_norm
    assert metrics["qlora_trainer_tokens_per_second"] == pytest.approx(last.tokens / last.seconds)
    assert metrics["qlora_trainer_peak_memory_bytes"] > 50e6
    assert metrics["qlora_trainer_step_duration_seconds_count"] >= 4


def test_second_prepare_finds_the_result(published, spec, tmp_path):
    folder, _ = published
    prepared = prepare(prepare_config(spec), work=tmp_path)
    assert prepared.published == ResultManifest.model_validate_json((folder / "manifest.json").read_text()).result


def test_second_prepare_with_if_exists_fail_is_rejected(published, spec, tmp_path):
    folder, _ = published
    changed_spec = spec.model_copy(update={"output": spec.output.model_copy(update={"if_exists": "Fail"})})
    before = (folder / "manifest.json").read_bytes()
    with pytest.raises(RunError, match=r"spec\.output\.ifExists: .* was published at .* change the seed") as caught:
        prepare(prepare_config(changed_spec), work=tmp_path)
    assert caught.value.reason == Reason.OUTPUT_EXISTS
    assert (folder / "manifest.json").read_bytes() == before


def test_second_prepare_with_overwrite_finds_only_its_own_result(published, spec, tmp_path):
    folder, _ = published
    changed_spec = spec.model_copy(update={"output": spec.output.model_copy(update={"if_exists": "Overwrite"})})
    config = prepare_config(changed_spec).model_copy(update={"uid": "uid-2"})
    assert prepare(config, work=tmp_path).published is None
    path = folder / "manifest.json"
    manifest = ResultManifest.model_validate_json(path.read_text())
    path.write_text(manifest.model_copy(update={"run": "uid-2"}).model_dump_json(by_alias=True, indent=2))
    assert prepare(config, work=tmp_path).published == manifest.result


def test_runs_of_one_digest_publish_bit_identical_adapters(published, spec, tmp_path, monkeypatch):
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


def test_merged_model_requested_later_needs_no_training(published, spec, tmp_path):
    folder, _ = published
    output = spec.output.model_copy(update={"merged": "bf16", "merge_base": "dequantised"})
    changed_spec = spec.model_copy(update={"output": output})
    prepared = prepare(prepare_config(changed_spec), work=tmp_path)
    assert (prepared.digest, prepared.published) == (folder.name, None)

    sink = RecordingSink()
    result = run(run_config(changed_spec, prepared), sink, work=tmp_path)
    assert not [progress for progress in sink.seen if progress.loss is not None]
    assert result.merged == f"{prepared.prefix}/merged/dequantised"

    manifest = MergedManifest.model_validate_json((folder / "merged/dequantised/manifest.json").read_text())
    assert manifest.merge.difference.relative < 0.03
    assert {"merged/dequantised/model.safetensors", "merged/dequantised/merge.json"} <= {
        file.path for file in manifest.files
    }
    for file in manifest.files:
        assert hashlib.sha256((folder / file.path).read_bytes()).hexdigest() == file.sha256, file.path
    assert prepare(prepare_config(changed_spec), work=tmp_path).published == result


def test_page_shows_each_figure_with_its_interval(published):
    folder, _ = published
    page = (folder / "report/report.html").read_text()
    report = RunReport.model_validate_json((folder / "report/report.json").read_text())
    loss, interval = report.evaluation.adapter.loss, report.confidence.adapter.loss
    assert f">{loss:.3f} <span>({interval.low:.3f} to {interval.high:.3f})</span><" in page
    answered = report.confidence.change.rouge_l
    assert answered is not None
    assert f"({answered.low:+.1%} to {answered.high:+.1%})" in page


def read_report(folder: Path) -> tuple[RunReport, list[EvaluatedRow]]:
    lines = (folder / "report/evaluation.jsonl").read_text().splitlines()
    report = RunReport.model_validate_json((folder / "report/report.json").read_text())
    return report, [EvaluatedRow.model_validate_json(line) for line in lines]


def test_page_opens_offline_and_has_every_plot(published):
    folder, _ = published
    page = (folder / "report/report.html").read_text()
    report, rows = read_report(folder)
    better = sum(row.adapter.loss < row.base.loss for row in rows)
    titles = ["Loss", "Each held-out row", "Learning rate", "Gradient norm", "Tokens per second"]
    assert [chart.title for chart in draw_plots(report, rows)] == titles
    assert f"{better} of {len(rows)} rows ({better / len(rows):.0%}) have a lower loss" in page
    assert page.count('<svg viewBox="') == len(titles)
    assert not re.findall(r"(?:src|href)=\"(?!#)[^\"]*|url\((?!#)", page.replace('xlink:href="#', 'href="#'))


def test_page_plots_validations_with_the_selected_step(published):
    report, rows = read_report(published[0])
    validations = tuple(
        ValidationRecord(step=step, loss=loss, token_accuracy=0, seconds=1)
        for step, loss in ((1, 3.0), (2, 2.5), (3, 2.7))
    )
    validated = report.model_copy(update={"held_out": validations, "adapter_step": 2})
    (chart,) = [chart for chart in draw_plots(validated, rows) if chart.title == "Held-out loss"]
    assert chart.caption == (
        "3 evaluations during training, lowest loss 2.500 after step 2; the adapter is from step 2."
    )


def test_page_shows_the_lineage_of_the_result(published, spec):
    folder, _ = published
    page = (folder / "report/report.html").read_text()
    report, _ = read_report(folder)
    lineage = page[page.index("<h2>Lineage</h2>") :]
    for part in (
        spec.model.uri,
        report.prepared.model.commit,
        spec.dataset.uri,
        report.prepared.dataset.digest,
        report.prepared.prefix,
        report.digest,
        ">ml/colours, attempt 1<",
        ">20% of them, chosen by a hash of each row<",
    ):
        assert part in lineage, part
    again = report.model_copy(update={"run": "uid-7", "attempt": 3})
    assert ">ml/colours, uid uid-7, attempt 3<" in render_html(again)


def test_page_shows_the_plan_and_its_reasons(published):
    page = (published[0] / "report/report.html").read_text()
    assert ">cpu: 1 node<" in page
    assert ">8 rows per step, micro-batches of 4 rows per process<" in page
    assert ">4 of 4; the adapter is from step 4<" in page
    assert "<li>a test</li>" in page
    report, _ = read_report(published[0])
    gpus = {"device": "cuda", "nodes": 2, "gpus_per_node": 4, "gpu_product": "NVIDIA-A10", "peak_bytes": 3 << 30}
    planned = render_html(report.model_copy(update={"plan": report.plan.model_copy(update=gpus)}))
    assert ">cuda: 2 nodes, 4 x NVIDIA-A10 each<" in planned
    assert ">peak memory, 3.00 GiB predicted<" in planned


def test_page_names_the_folder_of_the_merged_model(published):
    report, _ = read_report(published[0])
    merged = report.spec.output.model_copy(update={"merged": "bf16", "merge_base": "dequantised"})
    page = render_html(report.model_copy(update={"spec": report.spec.model_copy(update={"output": merged})}))
    assert "merged/dequantised next to the adapter, made after this page" in page
    assert "Merged model" not in render_html(report)


def test_page_shows_hostile_rows_and_uris_as_text(published):
    report, _ = read_report(published[0])
    script = "<script>alert(1)</script><img src=x onerror=alert(1)>"
    samples = tuple(
        sample.model_copy(update={name: script for name, value in sample if isinstance(value, str)})
        for sample in report.samples
    )
    preview = tuple(tuple(piece.model_copy(update={"text": script}) for piece in row) for row in report.preview)
    dataset = report.spec.dataset.model_copy(update={"uri": f"s3://data/{script}.jsonl"})
    spec = report.spec.model_copy(update={"dataset": dataset})
    page = render_html(report.model_copy(update={"samples": samples, "preview": preview, "spec": spec}))
    assert samples
    assert preview
    assert "<script" not in page
    assert "<img" not in page
    assert page.count("&lt;script&gt;") >= len(samples) + len(preview)


def test_page_shows_public_benchmarks(published):
    folder, _ = published
    report = RunReport.model_validate_json((folder / "report/report.json").read_text())
    score = TaskScore(task="arc_easy", metric="acc", base=0.25, base_error=0.125, adapter=0.5, adapter_error=None)
    page = render_html(report.model_copy(update={"tasks": (score,)}))
    assert re.search(r">arc_easy</th><td[^>]*>acc</td>", page)
    assert [figure in page for figure in (">0.250 ± 0.125<", ">0.500<")] == [True, True]
    assert "Public benchmarks" not in render_html(report)
