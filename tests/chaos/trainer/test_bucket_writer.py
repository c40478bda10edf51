"""Whoever can write the output changes objects between every two steps of a run: it publishes its own, or refuses."""

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import pytest

from qlora_api.names import Phase
from qlora_api.prepared import Prepared
from qlora_api.reasons import Reason
from qlora_api.result import Result
from qlora_api.runconfig import Published, RunConfig
from qlora_api.v1alpha1 import Checkpoint, Progress, QLoRAJobSpec
from qlora_trainer import stages
from qlora_trainer.errors import RunError
from qlora_trainer.inference.published_adapter import open_adapter
from qlora_trainer.prepare import prepare
from qlora_trainer.run import run
from qlora_trainer.runtime.shutdown import StopFlag
from qlora_trainer.storage.credentials import environment_secrets
from qlora_trainer.storage.snapshots import SourceResolver
from tests.chaos.trainer.bucket_writer import CODE, Attacker, forge_result, others
from tests.cluster.services.s3 import S3
from tests.unit.trainer.tiny import (
    RecordingSink,
    instruction_rows,
    make_spec,
    prepare_config,
    run_config,
    write_model,
    write_rows,
)

STEPS: Final = 4
_MANIFEST: Final = re.compile(r"/[0-9a-f]{16}/manifest\.json$")


class Sink(RecordingSink):
    """Lets the attacker act when a phase begins, and stops the run after a step."""

    def __init__(
        self, attack: Callable[[], object] | None = None, at: Phase | None = None, stop_after: int = 0
    ) -> None:
        super().__init__()
        self.stop = StopFlag()
        self._attack, self._at, self._stop_after = attack, at, stop_after

    def report(self, progress: Progress) -> None:
        super().report(progress)
        self.stop.requested = bool(self._stop_after) and progress.step == self._stop_after
        if self._attack is not None and progress.phase is self._at:
            attack, self._attack = self._attack, None
            attack()


class Victim:
    """A run with its output in the attacker's bucket; model and rows are its own."""

    def __init__(self, s3: S3, folder: Path) -> None:
        self.folder = folder
        self.attacker = Attacker(s3, s3.make_bucket("writer"))
        self.spec: QLoRAJobSpec = make_spec(
            write_model(folder / "model"),
            write_rows(folder / "rows.jsonl", instruction_rows()),
            f"s3://{self.attacker.bucket}/team",
            evaluation={"generations": 0},
            checkpoint={"steps": 1},
        )
        self.prepared = self.prepare()
        self.attacker.prefix = self.prepared.prefix.removeprefix(f"s3://{self.attacker.bucket}/")
        self.config: RunConfig = run_config(self.spec, self.prepared, total_steps=STEPS)

    def prepare(self, published: Published = None) -> Prepared:
        config = prepare_config(self.spec).model_copy(update={"published": published})
        return prepare(config, work=self.folder / "work")

    def others_files(self) -> set[Path]:
        """Return the files outside the folders that runs and consumers work in."""
        paths = (path.relative_to(self.folder) for path in self.folder.rglob("*"))
        return {path for path in paths if not path.parts[0].startswith(("work", "consumer"))}

    def run(
        self, sink: Sink, checkpoint: Checkpoint | None = None, attempt: int = 1, published: Published = None
    ) -> Result | None:
        known = {"checkpoint": checkpoint, "attempt": attempt, "published": published}
        config = self.config.model_copy(update=known)
        return run(config, sink, work=self.folder / f"work-{attempt}", stop=sink.stop)

    def weights(self, result: Result) -> bytes:
        """Return the adapter's weights as a consumer gets them."""
        resolver = SourceResolver(self.config.platform, environment_secrets())
        adapter = open_adapter(resolver, result.adapter, "adapter", self.folder / f"consumer-{uuid4()}")
        return (adapter.folder / "adapter_model.safetensors").read_bytes()


@dataclass(frozen=True)
class HonestRun:
    """What a run leaves in the bucket when nobody interferes."""

    prepared: dict[str, bytes]
    published: dict[str, bytes]
    result: Result
    weights: bytes


@pytest.fixture(scope="module")
def victim(s3: S3, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3.environment().items():
            patch.setenv(name, value)
        patch.setattr(stages, "load_in_fresh_process", lambda *_: None)  # imports torch; test_run.py covers it
        yield Victim(s3, tmp_path_factory.mktemp("victim"))


@pytest.fixture(scope="module")
def honest(victim: Victim) -> HonestRun:
    prepared = victim.attacker.objects()
    result = victim.run(Sink())
    assert result is not None
    return HonestRun(prepared, victim.attacker.objects(), result, victim.weights(result))


@pytest.fixture(autouse=True)
def untouched(victim: Victim) -> Iterator[None]:
    """Check that nothing is written outside the folders of work, and no code is there."""
    before = victim.others_files()
    yield
    assert victim.others_files() == before
    assert not list(victim.folder.rglob("PWNED"))
    assert not list(victim.folder.rglob("*.py"))


def test_changed_preparation_is_refused(victim: Victim, honest: HonestRun) -> None:
    victim.attacker.restore(honest.prepared)
    victim.attacker.plant_names()
    read = {
        key: content for key, content in honest.prepared.items() if not key.endswith(("prepared.json", "latest.json"))
    }
    assert len(read) == 3
    for key, content in read.items():
        for attack in (partial(victim.attacker.write, key, content[::-1]), partial(victim.attacker.delete, key)):
            attack()
            with pytest.raises(RunError, match=r"^spec\.output\.uri: ") as refused:
                victim.run(Sink())
            assert refused.value.reason is Reason.INVALID_SPEC
        victim.attacker.write(key, content)


def test_changed_checkpoints_are_not_resumed_from(victim: Victim, honest: HonestRun) -> None:
    """Between two attempts: the second one starts over, and ends with the same adapter."""
    victim.attacker.restore(honest.prepared)
    first, second = Sink(stop_after=2), Sink()
    with pytest.raises(RunError) as stopped:
        victim.run(first)
    assert stopped.value.reason is Reason.INTERRUPTED
    victim.attacker.forge_checkpoints()
    victim.attacker.plant_names()
    result = victim.run(second, first.seen[-1].checkpoint, attempt=2)
    assert result is not None
    assert victim.weights(result) == honest.weights
    for note in ("its manifest was replaced", "no earlier attempt reported it"):
        assert any(note in line for line in second.notes), second.notes


def test_planted_files_of_a_result_are_not_published(victim: Victim, honest: HonestRun) -> None:
    """While the run evaluates: it publishes its own files beside them."""
    victim.attacker.restore(honest.prepared)

    def plant() -> None:
        for key, content in honest.published.items():
            if "/adapter/" in key or "/report/" in key:
                victim.attacker.write(key, others(content) if key.endswith(".safetensors") else CODE)

    result = victim.run(Sink(plant, Phase.PUBLISHING))
    assert result is not None
    assert result.adapter != honest.result.adapter
    assert victim.weights(result) == honest.weights


FORGED: Final[dict[str, dict[str, Any]]] = {
    "of-another-job": {"job": "other"},
    "of-another-digest": {"fullDigest": "0" * 64},
    "complete": {},
}


@pytest.mark.parametrize("change", FORGED.values(), ids=FORGED)
@pytest.mark.parametrize("phase", [Phase.TRAINING, Phase.EVALUATING, Phase.PUBLISHING])
def test_result_planted_during_a_run_is_not_its_result(
    victim: Victim, honest: HonestRun, change: dict[str, Any], phase: Phase
) -> None:
    """Its files and its manifest are of one another; the run publishes its own beside it."""
    victim.attacker.restore(honest.prepared)
    key, planted = f"{victim.attacker.prefix}/manifest.json", forge_result(honest.published, change)
    sink = Sink(partial(victim.attacker.write_all, planted), phase)
    result = victim.run(sink)
    assert result is not None
    assert result.adapter not in {honest.result.adapter, None}
    assert victim.weights(result) == honest.weights
    assert victim.attacker.objects("manifest.json")[key] == planted[key]
    (manifest,) = {seen.manifest for seen in sink.seen[-1:]}
    assert manifest is not None
    assert hashlib.sha256(victim.attacker.objects()[manifest.uri.split("/", 3)[3]]).hexdigest() == manifest.digest


def test_only_a_reported_result_is_taken_after_a_pod_was_lost(victim: Victim, honest: HonestRun) -> None:
    """The next preparation and the next attempt know the manifests that earlier attempts reported."""
    victim.attacker.restore(honest.prepared)
    sink = Sink()
    result = victim.run(sink)
    assert result is not None
    manifest = sink.seen[-1].manifest
    assert manifest is not None
    assert victim.prepare((manifest,)).published == result
    assert victim.run(Sink(), attempt=2, published=(manifest,)) == result
    victim.attacker.write_all(forge_result(honest.published, {}))
    assert victim.prepare().published is not None
    for published in ((), (manifest,)):
        assert victim.prepare(published).published is None
        again = victim.run(Sink(), attempt=2, published=published)
        assert again is not None
        assert victim.weights(again) == honest.weights


def test_changed_files_of_a_result_are_not_taken_for_published(victim: Victim, honest: HonestRun) -> None:
    victim.attacker.restore(honest.published)
    assert victim.prepare().published == honest.result
    for key, content in honest.published.items():
        if "/adapter/" in key:
            changed = others(content) if key.endswith(".safetensors") else content[:-1] + b"?"
            assert len(changed) == len(content), key
            victim.attacker.restore(honest.published)
            victim.attacker.write(key, changed)
            with pytest.raises(RunError, match=r"does not match size and SHA-256 in its manifest|qlora\.json: "):
                victim.weights(honest.result)
    assert victim.prepare().published is None
