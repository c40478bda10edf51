"""Public benchmarks: real tasks of the harness on data from a local hub mirror, without a network."""

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qlora_api.prepared import PinnedTask, PinnedTasks
from qlora_api.reasons import Reason
from qlora_api.runconfig import Platform, PrepareConfig
from qlora_trainer.errors import RunError
from qlora_trainer.evaluation import lm_eval_tasks
from qlora_trainer.evaluation.lm_eval_tasks import (
    BenchmarkSuite,
    compare_task_metrics,
    describe_benchmarks,
    load_benchmarks,
    pin_benchmarks,
)
from qlora_trainer.prepare import prepare
from qlora_trainer.stages import load_benchmark_suite
from qlora_trainer.storage.credentials import environment_secrets
from qlora_trainer.storage.results import open_output
from qlora_trainer.storage.snapshots import SourceResolver
from tests.hub import COMMIT
from tests.unit.trainer.tiny import make_tokenizer, run_config, write_job
from tests.unit.trainer.tuned import make_trainable

CARD = """---
configs:
- config_name: ARC-Challenge
  data_files: [{split: test, path: ARC-Challenge/test-*}]
- config_name: ARC-Easy
  data_files:
  - {split: train, path: ARC-Easy/train-*}
  - {split: validation, path: ARC-Easy/validation-*}
  - {split: test, path: ARC-Easy/test-*}
---
"""


def questions(count: int) -> bytes:
    choices = {"text": ["red", "green", "blue", "black"], "label": ["A", "B", "C", "D"]}
    rows = [
        {"id": str(number), "question": f"Colour {number}?", "choices": choices, "answerKey": "AABA"[number % 4]}
        for number in range(count)
    ]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


def commit_questions(mirror: Path, commit: str, count: int) -> None:
    """Add a commit of the dataset to the mirror as its newest one."""
    repository = mirror / "datasets--allenai--ai2_arc"
    splits = ("train", "validation", "test")
    files = {f"ARC-Easy/{split}-00000-of-00001.parquet": questions(count) for split in splits}
    for name, content in {**files, "README.md": CARD.encode(), "ARC-Challenge/test-0.parquet": b"not fetched"}.items():
        path = repository / "snapshots" / commit / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs/main").write_text(commit)


def make_resolver(mirror: Path) -> SourceResolver:
    commit_questions(mirror, COMMIT, 12)
    return SourceResolver(Platform(hub_mirror=f"file://{mirror}"), environment_secrets())


@pytest.fixture(scope="module")
def resolver(tmp_path_factory) -> SourceResolver:
    return make_resolver(tmp_path_factory.mktemp("mirror"))


def test_benchmark_suite_runs_for_base_and_adapter(resolver, tmp_path):
    pinned = pin_benchmarks(["arc_easy"], resolver)
    suite = BenchmarkSuite(load_benchmarks(pinned, resolver, tmp_path), make_tokenizer(), 4, examples_per_task=8)
    trainable = make_trainable()
    for parameter in trainable.parameters():
        parameter.data.normal_(std=0.5)
    with trainable.evaluating(adapter=False):
        base = suite.run(trainable, "arc_easy")
    with trainable.evaluating():
        scores = compare_task_metrics(base, suite.run(trainable, "arc_easy"))
    assert [(score.task, score.metric) for score in scores] == [("arc_easy", "acc"), ("arc_easy", "acc_norm")]
    assert all((score.base_error or 0) > 0 for score in scores)
    # The random adapter is at chance level; the answer key favors the base.
    assert all(score.base > score.adapter for score in scores)


def test_task_with_unsuitable_data_is_refused_before_training(resolver, tmp_path):
    with pytest.raises(RunError, match=r"spec\.evaluation\.tasks: the data does not load") as caught:
        load_benchmarks(pin_benchmarks(["arc_challenge"], resolver), resolver, tmp_path)
    assert caught.value.reason == Reason.INVALID_SPEC


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("arc_eazy", "has no task 'arc_eazy'; see its list"),
        ("humaneval", "'humaneval' runs code that the model writes"),
    ],
)
def test_unsupported_tasks_are_refused_by_name(resolver, name, message):
    with pytest.raises(RunError, match=message) as caught:
        pin_benchmarks([name], resolver)
    assert caught.value.reason == Reason.INVALID_SPEC


def test_tag_expands_to_its_tasks(resolver):
    found = pin_benchmarks(["ai2_arc", "arc_easy"], resolver)
    assert found.tasks == (
        PinnedTask(
            name="arc_challenge",
            file="arc/arc_challenge.yaml",
            dataset="allenai/ai2_arc",
            commit=COMMIT,
            part="ARC-Challenge",
        ),
        PinnedTask(
            name="arc_easy", file="arc/arc_easy.yaml", dataset="allenai/ai2_arc", commit=COMMIT, part="ARC-Easy"
        ),
    )
    assert list(describe_benchmarks(found)) == [f"arc_challenge, arc_easy: allenai/ai2_arc is at {COMMIT}"]


def test_tasks_of_one_dataset_are_logged_in_one_line():
    tasks = tuple(PinnedTask(name=f"t{number}", file="f", dataset="o/d", commit="c") for number in range(57))
    assert list(describe_benchmarks(PinnedTasks(tasks=tasks))) == ["t0, t1, t2, t3 and 53 more: o/d is at c"]


def test_missing_benchmark_dataset_is_refused(tmp_path):
    (tmp_path / "mirror").mkdir()
    empty = SourceResolver(Platform(hub_mirror=f"file://{tmp_path}/mirror"), environment_secrets())
    with pytest.raises(RunError, match=r"the hub's mirror .* has no allenai/ai2_arc") as caught:
        pin_benchmarks(["arc_easy"], empty)
    assert caught.value.reason == Reason.INVALID_SPEC


def test_training_uses_the_tasks_pinned_by_prepare(tmp_path, monkeypatch):
    """The dataset gets a newer commit in between, and the index of all tasks, which takes seconds, is not read."""
    resolver = make_resolver(tmp_path / "mirror")
    job = write_job(tmp_path / "job", evaluation={"tasks": ["arc_easy"], "taskExamples": 40})
    prepare_config = PrepareConfig(namespace="ml", job="colours", spec=job, platform=resolver.platform)
    prepared = prepare(prepare_config, work=tmp_path)
    commit_questions(tmp_path / "mirror", "f" * 40, 40)
    monkeypatch.setattr(lm_eval_tasks, "_index", None)
    config = run_config(job, prepared).model_copy(update={"platform": resolver.platform})
    suite = load_benchmark_suite(
        resolver, open_output(resolver, job, "colours"), make_tokenizer(), config, tmp_path / "pod"
    )
    (task,) = suite.tasks["tasks"].values()
    assert len(list(task.test_docs())) == 12
