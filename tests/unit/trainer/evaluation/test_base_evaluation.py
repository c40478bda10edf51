"""The base is evaluated once, however often a run is killed or stopped afterwards."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest

from qlora_api.reasons import Reason
from qlora_api.report import RunReport
from qlora_api.runconfig import RunConfig
from qlora_api.v1alpha1 import Checkpoint, EvaluationSpec
from qlora_trainer import run as run_module
from qlora_trainer import stages
from qlora_trainer.distributed.world import World
from qlora_trainer.errors import RunError
from qlora_trainer.evaluation import evaluator as evaluator_module
from qlora_trainer.evaluation.base_evaluation import BaseEvaluationStore, EvaluationFingerprint
from qlora_trainer.evaluation.evaluator import BROKEN_BASE_HINT, EvaluationResult, Evaluator, RowStatistics
from qlora_trainer.evaluation.lm_eval_tasks import TaskMetric
from qlora_trainer.prepare import prepare
from qlora_trainer.storage.local_store import FileStore
from qlora_trainer.storage.store import OUTPUT_FIELD
from tests.unit.trainer.stopping import NEVER, run_until
from tests.unit.trainer.tiny import CPU, make_tokenizer, prepare_config, run_config, write_job
from tests.unit.trainer.tuned import make_trainable, token_rows

FINGERPRINT = EvaluationFingerprint(
    digest="0123456789abcdef",
    generations=2,
    max_answer_tokens=8,
    task_examples=None,
    benchmarks="",
    bits=4,
    device="cpu",
    dtype="float32",
    attention="sdpa",
    packing=True,
    micro_batch_size=0,
)
ROWS = token_rows(6)
RESULT = EvaluationResult(
    tuple(RowStatistics(row.label_count, 1 / (3 + number), 1) for number, row in enumerate(ROWS)),
    ("one", None, "three\ud7ff", None, None, ""),
    {("a", "acc"): TaskMetric(0.1, 0.01), ("a", "f1"): TaskMetric(1 / 3, None)},
)


class Killed(BaseException):
    """The process ends here: nothing of the trainer catches it."""


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    spec = write_job(tmp_path, checkpoint={"steps": 1})
    return run_config(spec, prepare(prepare_config(spec), work=tmp_path / "prepare"))


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record each pass over the validation set."""
    seen: list[str] = []
    compute = evaluator_module.compute_row_statistics

    def record(*args, **settings):
        if hint := settings.get("hint"):  # the loading check gives none
            seen.append("base" if hint == BROKEN_BASE_HINT else "adapter")
        return compute(*args, **settings)

    monkeypatch.setattr(evaluator_module, "compute_row_statistics", record)
    monkeypatch.setattr(stages, "load_in_fresh_process", lambda *_: None)
    return seen


def report_of(config: RunConfig) -> RunReport:
    folder = Path(config.prepared.prefix.removeprefix("file://"))
    return RunReport.model_validate_json((folder / "report/report.json").read_text())


def files_of(config: RunConfig) -> list[str]:
    folder = Path(config.prepared.prefix.removeprefix("file://"), "checkpoints")
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.json"))


def test_run_killed_after_the_base_evaluation_does_not_repeat_it(config, evaluated, tmp_path, monkeypatch):
    with monkeypatch.context() as context:
        context.setattr(run_module.stages, "train", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            run_until(config, NEVER, tmp_path / "first")
    assert evaluated == ["base"]
    notes = run_until(config, NEVER, tmp_path / "second")
    assert evaluated == ["base", "adapter"]
    assert "the base was evaluated by an earlier attempt" in notes
    assert files_of(config) == []  # deleted with the checkpoints


def test_run_stopped_twice_reports_as_an_uninterrupted_one(config, evaluated, tmp_path):
    for step in (1, 2):
        run_until(config, step, tmp_path / f"work-{step}")
    run_until(config, NEVER, tmp_path / "last")
    assert evaluated == ["base", "adapter"]
    stopped = report_of(config)
    spec = config.spec.model_copy(
        update={"output": config.spec.output.model_copy(update={"uri": f"file://{tmp_path / 'other'}"})}
    )
    whole = run_config(spec, prepare(prepare_config(spec), work=tmp_path / "prepare"))
    run_until(whole, NEVER, tmp_path / "whole")
    assert (stopped.evaluation, stopped.confidence) == (report_of(whole).evaluation, report_of(whole).confidence)


@pytest.mark.parametrize(
    ("changed", "wanted"),
    [
        pytest.param(lambda record: record["rows"][0].update(loss=0.0), "does not name it", id="planted"),
        pytest.param(lambda record: record.clear(), "does not name it", id="emptied"),
    ],
)
def test_evaluation_that_the_reported_checkpoint_does_not_name_is_repeated(
    config, evaluated, tmp_path, changed, wanted
):
    run_until(config, 1, tmp_path / "first")
    folder = Path(config.prepared.prefix.removeprefix("file://"), "checkpoints")
    manifest = folder / "step-000001-a1/manifest.json"
    uri = f"{config.prepared.prefix}/checkpoints/step-000001-a1"
    file = folder / "base-evaluation/evaluation.json"
    record = json.loads(file.read_text())
    changed(record)
    file.write_text(json.dumps(record))
    reported = Checkpoint(
        step=1, uri=uri, time="2026-01-01T00:00:00Z", verified=True, digest=stages.sha256_of(manifest)
    )
    notes = run_until(config.model_copy(update={"checkpoint": reported}), NEVER, tmp_path / "second")
    assert evaluated == ["base", "base", "adapter"]
    assert [note for note in notes if "is evaluated again" in note and wanted in note]


def make_store(folder: Path, **changes) -> tuple[BaseEvaluationStore, list[str]]:
    notes: list[str] = []
    output = FileStore(f"file://{folder}", OUTPUT_FIELD)
    return BaseEvaluationStore(output, FINGERPRINT.model_copy(update=changes), notes.append), notes


def test_stored_evaluation_is_read_back_exactly(tmp_path):
    store, notes = make_store(tmp_path)
    assert store.load(ROWS, None) is None
    store.save(RESULT)
    again, _ = make_store(tmp_path)
    assert again.load(ROWS, store.digest) == RESULT
    assert (again.digest, notes) == (store.digest, [])


@pytest.mark.parametrize(
    ("changes", "rows", "message"),
    [
        pytest.param({"dtype": "bfloat16"}, ROWS, "dtype was float32 and is bfloat16", id="another-gpu"),
        pytest.param({"micro_batch_size": 2}, ROWS, "microBatchSize was 0 and is 2", id="8-bits-shrunk"),
        pytest.param({"generations": 16}, ROWS, "generations was 2 and is 16", id="more-answers"),
        pytest.param({"benchmarks": "f" * 64}, ROWS, "benchmarks was", id="other-benchmarks"),
        pytest.param({}, ROWS[:5], "its rows are not those", id="other-rows"),
        pytest.param({}, ROWS[::-1], "its rows are not those", id="other-order"),
    ],
)
def test_evaluation_of_other_settings_is_not_used(tmp_path, changes, rows, message):
    make_store(tmp_path)[0].save(RESULT)
    store, notes = make_store(tmp_path, **changes)
    assert store.load(rows, None) is None
    assert message in notes[0]


def test_evaluation_that_cannot_be_read_now_is_not_repeated(tmp_path, monkeypatch):
    make_store(tmp_path)[0].save(RESULT)
    failure = RunError(Reason.S3_UNAVAILABLE, "spec.output.uri: GetObject fails with 503")
    monkeypatch.setattr(FileStore, "read", Mock(side_effect=failure))
    store, notes = make_store(tmp_path)
    with pytest.raises(RunError, match="fails with 503"):
        store.load(ROWS, None)
    assert notes == []


def test_evaluation_that_cannot_be_written_does_not_end_the_run(tmp_path):
    (tmp_path / "0123456789abcdef").write_text("a file where the folder should be")
    store, notes = make_store(tmp_path)
    store.save(RESULT)
    assert (store.digest, len(notes)) == ("", 1)


@dataclasses.dataclass
class FakeSuite:
    """Benchmarks of which one kills the process."""

    kills: str
    ran: list[str]
    names: tuple[str, ...] = ("a", "b", "c")

    def run(self, _trainable, name: str) -> dict:
        if name == self.kills:
            raise Killed
        self.ran.append(name)
        return {(name, "acc"): TaskMetric(0.5, None)}


def parts(evaluator: Evaluator, store: BaseEvaluationStore) -> Iterator[EvaluationResult]:
    trainable = make_trainable()
    earlier = store.load(ROWS, None)
    yield evaluator.evaluate(trainable, adapter=False, earlier=earlier, on_part=store.save)


def test_benchmarks_that_were_finished_are_not_run_again(tmp_path):
    ran: list[str] = []

    def make(kills: str) -> Evaluator:
        suite = FakeSuite(kills, ran)
        spec = EvaluationSpec(generations=0)
        return Evaluator(ROWS, make_tokenizer(), spec, 4, packing=True, world=World(CPU), benchmark_suite=suite)

    with pytest.raises(Killed):
        list(parts(make("c"), make_store(tmp_path)[0]))
    (found,) = parts(make(""), make_store(tmp_path)[0])
    assert ran == ["a", "b", "c"]
    assert [task for task, _ in found.task_metrics] == ["a", "b", "c"]
