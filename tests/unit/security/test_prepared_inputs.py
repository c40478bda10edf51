"""Whoever can write the output or a mirror swaps files between preparation and training: training refuses them."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import boto3
import pytest
from moto import mock_aws

from qlora_api.model_config import MAX_CONFIG, reduce_config
from qlora_api.names import TERMINATION_MESSAGE_BYTES, output_root
from qlora_api.prepared import PinnedTask, PinnedTasks, Prepared
from qlora_api.reasons import Reason
from qlora_api.report import TerminationMessage
from qlora_api.runconfig import Platform, RunConfig
from qlora_api.v1alpha1 import QLoRAJobSpec
from qlora_api.v1alpha1.types import MAX_URI
from qlora_operator.lifecycle.gang import classify_child
from qlora_trainer import stages
from qlora_trainer.data import shards
from qlora_trainer.data.dataset import Dataset, DatasetScan, scan_rows
from qlora_trainer.errors import RunError
from qlora_trainer.evaluation.lm_eval_tasks import load_benchmarks
from qlora_trainer.prepare import prepare
from qlora_trainer.runtime.termination_message import to_json_line
from qlora_trainer.storage.credentials import environment_secrets
from qlora_trainer.storage.local_store import FileStore
from qlora_trainer.storage.prepared_inputs import find_inputs
from qlora_trainer.storage.results import open_output
from qlora_trainer.storage.snapshots import SourceResolver
from qlora_trainer.storage.store import MODEL_FIELD
from tests.make import DIGEST, NOW, make_job, make_prepared, make_prepared_child, make_result
from tests.unit.trainer.conftest import THIRD_PARTY_WARNINGS
from tests.unit.trainer.evaluation.test_lm_eval_tasks import COMMIT, commit_questions, make_resolver
from tests.unit.trainer.tiny import (
    instruction_rows,
    make_spec,
    make_tokenizer,
    prepare_config,
    run_config,
    write_job,
    write_model,
    write_rows,
)

pytestmark = [pytest.mark.filterwarnings(warning) for warning in THIRD_PARTY_WARNINGS]

NAMES = (shards.TRAINING, shards.EVALUATION)


class Run(NamedTuple):
    """A prepared run, before its training pods start."""

    config: RunConfig
    resolver: SourceResolver
    output: FileStore
    folder: Path
    """The result's folder, which the attacker can write."""

    def read(self, work: Path) -> None:
        """Read everything that a training pod reads, as it does."""
        stages.load_data(self.output, self.config, work)
        stages.fetch_model(self.resolver, self.config, work)


def prepared_run(spec: QLoRAJobSpec, work: Path, platform: Platform | None = None) -> Run:
    prepared = prepare(prepare_config(spec, platform=platform), work=work)
    config = run_config(spec, prepared).model_copy(update={"platform": platform or Platform()})
    resolver = SourceResolver(config.platform, environment_secrets())
    return Run(config, resolver, open_output(resolver, spec, config.job), Path(prepared.prefix.removeprefix("file://")))


@pytest.fixture(scope="module")
def prepared_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with model, rows and output of a prepared run; tests change copies of the output."""
    folder = tmp_path_factory.mktemp("prepared")
    prepared_run(write_job(folder), folder / "work")
    return folder


@pytest.fixture
def run(prepared_once: Path, tmp_path: Path) -> Run:
    spec = make_spec(f"file://{prepared_once}/model", f"file://{prepared_once}/rows.jsonl", f"file://{tmp_path}/output")
    return prepared_run(spec, tmp_path / "work")


def rewrite(path: Path, change: Callable[[tuple[int, ...]], tuple[int, ...]]) -> None:
    """Replace the tokens of all rows; their number and labels stay the same."""
    rows = list(shards.read_token_rows(path))
    with shards.ShardWriter(path, with_text=True) as writer:
        for row in rows:
            writer.add(replace(row, input_ids=change(row.input_ids)))


def other_rows(folder: Path) -> None:
    shutil.copy(folder / shards.EVALUATION, folder / shards.TRAINING)


def as_many_rows(folder: Path) -> None:
    rewrite(folder / shards.TRAINING, lambda ids: ids[::-1])


def held_out_rows(folder: Path) -> None:
    rewrite(folder / shards.EVALUATION, lambda ids: (ids[0],) * len(ids))


def shards_exchanged(folder: Path) -> None:
    training, held_out = ((folder / name).read_bytes() for name in NAMES)
    (folder / shards.TRAINING).write_bytes(held_out)
    (folder / shards.EVALUATION).write_bytes(training)


def rows_and_their_record(folder: Path) -> None:
    """Write a record that fits the swapped rows, as only the operator knows the digest of the record."""
    as_many_rows(folder)
    (record,) = (folder / "prepared").glob("inputs-*.json")
    record.write_text(record.read_text().replace('"model"', ' "model"'))


def no_parquet(folder: Path) -> None:
    (folder / shards.TRAINING).write_bytes(b"PAR1" * 3)


@pytest.mark.parametrize(
    "swap", [other_rows, as_many_rows, held_out_rows, shards_exchanged, rows_and_their_record, no_parquet]
)
def test_swapped_token_rows_are_refused(run: Run, tmp_path: Path, swap: Callable[[Path], None]) -> None:
    run.read(tmp_path / "before")
    swap(run.folder)
    with pytest.raises(RunError, match=r"^spec\.output\.uri: file://.*/prepared/.* changed since .*; create the") as e:
        run.read(tmp_path / "after")
    assert e.value.reason is Reason.INVALID_SPEC


def test_deleted_record_is_an_error_and_not_an_older_version(run: Run, tmp_path: Path) -> None:
    for record in (run.folder / "prepared").glob("inputs-*.json"):
        record.unlink()
    with pytest.raises(RunError, match=r"spec\.output\.uri: there is no .*/prepared/inputs-"):
        run.read(tmp_path / "pod")


def test_run_of_an_earlier_version_is_read_without_digests(run: Run, tmp_path: Path) -> None:
    facts = run.config.prepared.model_dump(mode="json", by_alias=True)
    earlier = Prepared.model_validate({key: facts[key] for key in facts if key not in {"inputs", "fullDigest"}})
    config = run.config.model_copy(update={"prepared": earlier})
    assert find_inputs(run.output, earlier) is None
    run._replace(config=config).read(tmp_path / "pod")


def largest_config() -> str:
    """Return the longest configuration that preparation records; in a message, quotes have backslashes."""
    configs = (reduce_config({"activation": ["\\"] * quotes}) for quotes in range(400, 0, -1))
    plain = (reduce_config({"model_type": "x" * size}) for size in range(MAX_CONFIG, 0, -1))
    return max(
        (next(filter(None, candidates)) for candidates in (configs, plain)), key=lambda text: len(json.dumps(text))
    )


def test_facts_with_digests_fit_into_a_termination_message(run: Run) -> None:
    prepared = run.config.prepared
    assert (prepared.full_digest or "")[:16] == prepared.digest
    model = prepared.model.model_copy(update={"uri": "s3://" + "m" * 200, "config": largest_config()})
    largest = prepared.model_copy(update={"prefix": "s3://" + "p" * 300, "model": model})
    line = to_json_line(TerminationMessage(reason=Reason.PREPARED, prepared=largest), limit=10**6)
    assert len(line) <= TERMINATION_MESSAGE_BYTES


def test_facts_with_the_longest_uris_reach_the_operator_as_they_are() -> None:
    """The URIs alone would be longer than a termination message, of characters with one byte or with four."""
    for character in "mü🦙":
        spec = make_spec(
            f"pvc://models/{character * (MAX_URI - 13)}", "s3://data/rows.jsonl", f"s3://data/{'o' * (MAX_URI - 10)}"
        )
        job = replace(make_job(), spec=spec)
        root = output_root(spec.output.uri, job.ref.name)
        result = make_result()
        published = result.model_copy(
            update={
                "adapter": f"{root}/{DIGEST}/{'f' * 16}/adapter",
                "report": f"{root}/{DIGEST}/{'f' * 16}/report/report.json",
                "merged": f"{root}/{DIGEST}/merged/dequantised/{'f' * 16}",
            }
        )
        model = make_prepared().model.model_copy(update={"uri": spec.model.uri, "config": largest_config()})
        facts = {"full_digest": "d" * 64, "inputs": "e" * 64, "prefix": f"{root}/{DIGEST}", "model": model}
        for found in (None, published):
            prepared = make_prepared(**facts, published=found)
            line = to_json_line(TerminationMessage(reason=Reason.ALREADY_PUBLISHED, prepared=prepared))
            assert len(line.encode()) <= TERMINATION_MESSAGE_BYTES
            state = classify_child(job, make_prepared_child(line), NOW)
            assert state.termination_message is not None
            assert (state.reason, state.termination_message.prepared) == (Reason.ALREADY_PUBLISHED, prepared)


def test_rows_that_change_while_prepare_reads_them_are_refused(
    prepared_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files of a claim are read in place, and twice: split and digest would be of other rows than the tokens."""
    rows = write_rows(tmp_path / "rows.jsonl", instruction_rows())
    spec = make_spec(f"file://{prepared_once}/model", rows, f"file://{tmp_path}/output")

    def swap_after_the_scan(dataset: Dataset, fraction: float) -> DatasetScan:
        scan = scan_rows(dataset, fraction)
        write_rows(tmp_path / "rows.jsonl", instruction_rows()[::-1])
        return scan

    monkeypatch.setattr("qlora_trainer.prepare.scan_rows", swap_after_the_scan)
    with pytest.raises(RunError, match=r"^spec\.dataset\.uri: rows changed while preparation read them") as caught:
        prepare(prepare_config(spec), work=tmp_path / "work")
    assert caught.value.reason is Reason.DATASET_INVALID


REPOSITORY = "models--org--tiny"


@pytest.fixture
def mirrored(prepared_once: Path, tmp_path: Path) -> Run:
    """A run whose model comes from the mirror of a hub, where the commit is only the name of a folder."""
    mirror = tmp_path / "mirror"
    shutil.copytree(prepared_once / "model", mirror / REPOSITORY / "snapshots" / COMMIT)
    (mirror / REPOSITORY / "refs").mkdir()
    (mirror / REPOSITORY / "refs/main").write_text(COMMIT)
    spec = make_spec("hf://org/tiny", f"file://{prepared_once}/rows.jsonl", f"file://{tmp_path}/output")
    return prepared_run(spec, tmp_path / "work", Platform(hub_mirror=f"file://{mirror}"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        pytest.param("chat_template.jinja", "{{ 'hidden' }}", id="template-added"),
        pytest.param("tokenizer_config.json", '{"chat_template": "{{ 1 }}"}', id="template-in-the-tokenizer"),
        pytest.param("tokenizer.json", "{}", id="tokenizer"),
        pytest.param("config.json", '{"model_type": "gpt2"}', id="config"),
        pytest.param("model-extra.safetensors", "x", id="weights-added"),
    ],
)
def test_swapped_file_of_a_mirrored_model_is_refused(mirrored: Run, tmp_path: Path, name: str, content: str) -> None:
    mirrored.read(tmp_path / "before")
    (tmp_path / "mirror" / REPOSITORY / "snapshots" / COMMIT / name).write_text(content)
    with pytest.raises(RunError, match=rf"^spec\.model\.uri: {name} of the model changed since .*; create the") as e:
        mirrored.read(tmp_path / "after")
    assert e.value.reason is Reason.MODEL_NOT_FOUND


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00001.safetensors", "tokenizer.json"])
def test_swapped_weights_in_a_bucket_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(variable, "us-east-1")
    write_model(tmp_path / "model")
    rows = write_rows(tmp_path / "rows.jsonl", instruction_rows())
    with mock_aws():
        client = boto3.client("s3")
        client.create_bucket(Bucket="mirror")
        client.put_object(Bucket="mirror", Key=f"{REPOSITORY}/refs/main", Body=COMMIT.encode())
        for file in (tmp_path / "model").iterdir():
            client.upload_file(str(file), "mirror", f"{REPOSITORY}/snapshots/{COMMIT}/{file.name}")
        spec = make_spec("hf://org/tiny", rows, f"file://{tmp_path}/output")
        run = prepared_run(spec, tmp_path / "work", Platform(hub_mirror="s3://mirror"))
        run.read(tmp_path / "before")
        client.put_object(Bucket="mirror", Key=f"{REPOSITORY}/snapshots/{COMMIT}/{name}", Body=b"other weights")
        with pytest.raises(RunError, match=rf"spec\.model\.uri: {name} of the model changed since preparation"):
            run.read(tmp_path / "after")


@pytest.mark.parametrize("ref", ["../../../models--evil--x/snapshots/1", "main", "$(touch x)", "", "A" * 40, "a" * 41])
def test_mirror_whose_ref_is_no_commit_is_refused(tmp_path: Path, ref: str) -> None:
    folder = tmp_path / REPOSITORY
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text(ref)
    resolver = SourceResolver(Platform(hub_mirror=f"file://{tmp_path}"), environment_secrets())
    with pytest.raises(RunError, match=r"^spec\.model\.uri: .*refs/main of the mirror .* does not name a commit"):
        resolver.resolve("hf://org/tiny", "main", MODEL_FIELD)


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """A run with a public benchmark, and the mirror that its data comes from."""
    folder = tmp_path_factory.mktemp("benchmarks")
    resolver = make_resolver(folder / "mirror")
    spec = write_job(folder / "job", evaluation={"tasks": ["arc_easy"]})
    return prepared_run(spec, folder / "work", resolver.platform), folder / "mirror"


def load_suite(run: Run, work: Path) -> object:
    return stages.load_benchmark_suite(run.resolver, run.output, make_tokenizer(), run.config, work)


def test_swapped_benchmark_tasks_are_refused(benchmarks: tuple[Run, Path], tmp_path: Path) -> None:
    run, _ = benchmarks
    path = run.folder / shards.TASKS
    honest = path.read_text()
    path.write_text(honest.replace("ARC-Easy", "ARC-Challenge"))
    with pytest.raises(RunError, match=r"prepared/tasks\.json changed since preparation"):
        load_suite(run, tmp_path)
    path.write_text(honest)
    assert load_suite(run, tmp_path) is not None


def test_runs_of_one_digest_keep_their_own_benchmark_tasks(tmp_path: Path) -> None:
    """Benchmarks are no part of the digest, and a benchmark's `main` moves on between two preparations."""
    resolver = make_resolver(tmp_path / "mirror")
    spec = write_job(tmp_path / "job", evaluation={"tasks": ["arc_easy"]})
    first = prepared_run(spec, tmp_path / "work", resolver.platform)
    later = "b" * 40
    commit_questions(tmp_path / "mirror", later, 4)
    second = prepared_run(spec, tmp_path / "work", resolver.platform)
    assert first.config.prepared.digest == second.config.prepared.digest
    assert first.config.prepared.inputs != second.config.prepared.inputs
    for run in (first, second, first):
        assert load_suite(run, tmp_path / "suite") is not None
        run.read(tmp_path / "rows")


def test_rows_that_are_there_with_other_content_are_not_replaced(run: Run, tmp_path: Path) -> None:
    """Another version of pyarrow writes other bytes for the same rows."""
    (run.folder / shards.TRAINING).write_bytes(b"other bytes")
    spec = run.config.spec
    again = prepared_run(spec, tmp_path / "again")
    assert (run.folder / shards.TRAINING).read_bytes() == b"other bytes"
    again.read(tmp_path / "rows")
    with pytest.raises(RunError, match=r"prepared/train\.parquet changed since preparation"):
        run.read(tmp_path / "first")


def test_swapped_benchmark_data_are_refused(benchmarks: tuple[Run, Path], tmp_path: Path) -> None:
    run, mirror = benchmarks
    pinned = PinnedTasks.model_validate_json((run.folder / shards.TASKS).read_text())
    load_benchmarks(pinned, run.resolver, tmp_path / "before")
    commit_questions(mirror, COMMIT, 4)
    with pytest.raises(RunError, match=r"spec\.evaluation\.tasks: the data of task 'arc_easy' .* changed since"):
        load_benchmarks(pinned, run.resolver, tmp_path / "after")
    earlier = PinnedTasks(tasks=tuple(PinnedTask(**task.model_dump(exclude={"data"})) for task in pinned.tasks))
    load_benchmarks(earlier, run.resolver, tmp_path / "earlier")
