"""Public benchmarks: real tasks of the harness on data from a mirror of the hub, without a network."""

import dataclasses
import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qlora_api.names import Reason
from qlora_api.runconfig import Platform
from qlora_trainer.benchmarks import Battery, fetch_benchmark, find_benchmarks, load_benchmarks, score_tasks
from qlora_trainer.errors import RunError
from qlora_trainer.secrets import environment_secrets
from qlora_trainer.snapshot import Places
from tests.hub import COMMIT
from tests.unit.trainer.tiny import make_tokenizer
from tests.unit.trainer.tuned import make_tuned

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


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Places:
    mirror = tmp_path_factory.mktemp("mirror")
    repository = mirror / "datasets--allenai--ai2_arc"
    files = {f"ARC-Easy/{split}-00000-of-00001.parquet": questions(12) for split in ("train", "validation", "test")}
    for name, content in {**files, "README.md": CARD.encode(), "ARC-Challenge/test-0.parquet": b"not fetched"}.items():
        path = repository / "snapshots" / COMMIT / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(COMMIT)
    return Places(Platform(hub_mirror=f"file://{mirror}"), environment_secrets())


def test_base_and_adapter_take_a_real_task(places, tmp_path):
    (found,) = find_benchmarks(["arc_easy"])
    assert (found.dataset, found.part) == ("allenai/ai2_arc", "ARC-Easy")
    battery, tuned = (
        Battery(load_benchmarks(["arc_easy"], places, tmp_path), make_tokenizer(), 4, examples=8),
        make_tuned(),
    )
    for parameter in tuned.parameters():
        parameter.data.normal_(std=0.5)
    with tuned.evaluating(adapter=False):
        base = battery.examine(tuned)
    with tuned.evaluating():
        scores = score_tasks(base, battery.examine(tuned))
    assert [(score.task, score.metric) for score in scores] == [("arc_easy", "acc"), ("arc_easy", "acc_norm")]
    assert all((score.base_error or 0) > 0 for score in scores)
    assert all(
        score.base > score.adapter for score in scores
    )  # the noise knows nothing; the key is mostly what the base says


def test_data_that_does_not_fit_its_task_is_refused_before_training(places, tmp_path):
    with pytest.raises(RunError, match=r"spec\.evaluation\.tasks: the data does not load") as caught:
        load_benchmarks(["arc_challenge"], places, tmp_path)
    assert caught.value.reason == Reason.INVALID_SPEC


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("arc_eazy", "has no task 'arc_eazy'; see its list"),
        ("humaneval", "'humaneval' runs code that the model writes"),
    ],
)
def test_what_cannot_be_run_is_refused_by_name(name, message):
    with pytest.raises(RunError, match=message) as caught:
        find_benchmarks([name])
    assert caught.value.reason == Reason.INVALID_SPEC


def test_a_tag_stands_for_its_tasks(places, tmp_path):
    found = find_benchmarks(["ai2_arc", "arc_easy"])
    assert [benchmark.name for benchmark in found] == ["arc_challenge", "arc_easy"]
    with pytest.raises(RunError, match=r"the hub's mirror .* has no allenai/elsewhere") as caught:
        fetch_benchmark(dataclasses.replace(found[0], dataset="allenai/elsewhere"), places, tmp_path)
    assert caught.value.reason == Reason.INVALID_SPEC
