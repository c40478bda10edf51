"""The gate: violations and their messages; a rejected result is uploaded and can be published later."""

import hashlib
from pathlib import Path

import pytest

from qlora_api.reasons import Reason
from qlora_api.report import ResultManifest
from qlora_api.v1alpha1 import EvaluationStatus, GateSpec, Metrics, QLoRAJobSpec
from qlora_trainer import stages
from qlora_trainer.errors import RunError
from qlora_trainer.prepare import prepare
from qlora_trainer.publishing.gate import find_violations, has_required_metrics
from qlora_trainer.run import run
from tests.unit.trainer.tiny import (
    RecordingSink,
    prepare_config,
    run_config,
    write_job,
)


def evaluation(base: float, adapter: float, **answers: float) -> EvaluationStatus:
    return EvaluationStatus(
        base=Metrics(loss=base, perplexity=1, token_accuracy=0),
        adapter=Metrics(loss=adapter, perplexity=1, token_accuracy=0, **answers),
        rows=1,
        tokens=1,
    )


@pytest.mark.parametrize(
    ("gate", "found", "violations"),
    [
        ({}, evaluation(2, 9), ()),
        ({"max_loss_increase": 0}, evaluation(2, 2), ()),
        (
            {"max_loss_increase": 0},
            evaluation(2, 2.1),
            (
                "spec.evaluation.gate.maxLossIncrease: the held-out loss changed from base to adapter by "
                "+5.00%, but must be at most +0.00%",
            ),
        ),
        ({"max_loss_increase": 0.06}, evaluation(2, 2.1), ()),
        ({"max_loss_increase": -0.25}, evaluation(2, 1.5), ()),
        (
            {"max_loss_increase": -0.1, "max_loss": 1.8},
            evaluation(2, 1.9),
            (
                "spec.evaluation.gate.maxLossIncrease: the held-out loss changed from base to adapter by "
                "-5.00%, but must be at most -10.00%",
                "spec.evaluation.gate.maxLoss: the held-out loss is 1.9000, but must be at most 1.8000",
            ),
        ),
        ({"min_exact_match": 0.5, "min_rouge_l": 0.3}, evaluation(2, 3, exact_match=0.5, rouge_l=0.4), ()),
        (
            {"min_rouge_l": 0.5},
            evaluation(2, 1, exact_match=0.5, rouge_l=0.4),
            ("spec.evaluation.gate.minRougeL: the answers' mean ROUGE-L is 0.4000, but must be at least 0.5000",),
        ),
        (
            {"min_exact_match": 0.5},
            evaluation(2, 1),
            (
                "spec.evaluation.gate.minExactMatch: no answers to held-out rows were generated, so there is no "
                "value to compare with 0.5",
            ),
        ),
    ],
)
def test_find_violations(gate, found, violations):
    assert find_violations(GateSpec(**gate), found) == violations


def test_gate_on_answers_without_answers_lacks_metrics():
    assert not has_required_metrics(GateSpec(min_rouge_l=0.1), evaluation(2, 1))
    assert has_required_metrics(GateSpec(max_loss=0.1), evaluation(2, 1))


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> QLoRAJobSpec:
    return write_job(tmp_path_factory.mktemp("gate"), evaluation={"generations": 0, "gate": {"maxLoss": 0.001}})


def with_gate(spec: QLoRAJobSpec, **gate: float) -> QLoRAJobSpec:
    changed = spec.evaluation.model_copy(update={"gate": GateSpec(**gate)})
    return spec.model_copy(update={"evaluation": changed})


def test_rejected_result_is_uploaded_and_published_later_without_training(spec, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "load_in_fresh_process", lambda *_: None)
    prepared = prepare(prepare_config(spec), work=tmp_path)
    folder = Path(prepared.prefix.removeprefix("file://"))

    with pytest.raises(
        RunError, match=r"gate\.maxLoss: the held-out loss is .*rejected/adapter but not published"
    ) as rejected:
        run(run_config(spec, prepared, total_steps=1), RecordingSink(), work=tmp_path)
    assert rejected.value.reason == Reason.GATE_FAILED
    assert not (folder / "manifest.json").exists()
    assert not (folder.parent / "latest.json").exists()

    with pytest.raises(RunError, match=r"gate\.maxLoss: .*rejected/adapter but not published"):
        prepare(prepare_config(spec), work=tmp_path)

    # No answers were generated, so a gate on answers needs another run.
    assert prepare(prepare_config(with_gate(spec, min_rouge_l=0.1)), work=tmp_path).published is None

    accepted = prepare(prepare_config(with_gate(spec, max_loss=99)), work=tmp_path)
    assert accepted.published is not None
    assert accepted.published.adapter == f"{prepared.prefix}/rejected/adapter"
    manifest = ResultManifest.model_validate_json((folder / "manifest.json").read_text())
    for file in manifest.files:
        assert hashlib.sha256((folder / file.path).read_bytes()).hexdigest() == file.sha256, file.path

    with pytest.raises(RunError, match=r"maxLoss.*It was published as .* by a run whose gate it passed"):
        prepare(prepare_config(spec), work=tmp_path)
