"""Whoever can write the output replaces checkpoints with their manifests: only what a run reported is resumed from."""

import hashlib
import json
import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from safetensors.torch import save_file

from qlora_api.reasons import Reason
from qlora_api.v1alpha1 import Attempt, Checkpoint, ManifestRef, OutputStatus, Progress, QLoRAJobStatus
from qlora_operator.lifecycle import reported_checkpoint, reported_manifests
from qlora_trainer.observability.progress import DELIVERED
from qlora_trainer.storage.local_store import FileStore
from qlora_trainer.storage.store import OUTPUT_FIELD
from qlora_trainer.training.checkpoint_store import CheckpointCallbacks, CheckpointStore
from tests.make import make_spec
from tests.unit.trainer.states import FINGERPRINT, make_state

STARTED: Final = datetime(2026, 1, 2, tzinfo=UTC)
OTHERS_WEIGHT: Final = 666.0


class Run:
    """Attempts of one run, and what each reported."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / FINGERPRINT.digest / "checkpoints"
        self.reported: list[Checkpoint] = []
        self.notes: list[str] = []
        self._output = FileStore(f"file://{folder}", OUTPUT_FIELD)

    def attempt(self, number: int) -> CheckpointStore:
        callbacks = CheckpointCallbacks(self.notes.append, self.reported.append)
        return CheckpointStore(self._output, FINGERPRINT, number, STARTED, callbacks)

    def resume(self) -> tuple[int, float] | None:
        """Return step and weight that the next attempt starts from."""
        found = self.attempt(2).load_latest(self.reported[-1])
        return (found.checkpoint_id.step, found.state.weights["a"][0].item()) if found else None


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Return a run whose first attempt has written checkpoints of the steps 2, 3 and 4."""
    run = Run(tmp_path)
    first = run.attempt(1)
    for step in (2, 3, 4):
        first.save(make_state(step), keep=2)
    return run


def replace(folder: Path) -> None:
    """Put other weights into a checkpoint, and sign for them in its manifest."""
    save_file({"a": torch.full((2,), OTHERS_WEIGHT)}, folder / "adapter.safetensors")
    manifest: Any = json.loads((folder / "manifest.json").read_text())
    for file in manifest["files"]:
        content = (folder / file["path"]).read_bytes()
        file |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def plant(folder: Path, name: str) -> None:
    """Write a checkpoint of one's own; its step and history are those of an honest one."""
    shutil.copytree(folder / "step-000004-a1", folder / name)
    replace(folder / name)


def name_the_planted_one(folder: Path) -> None:
    """Replace the newest, and let an older one that was replaced too be named by it."""
    replace(folder / "step-000003-a1")
    digest = hashlib.sha256((folder / "step-000003-a1/manifest.json").read_bytes()).hexdigest()
    newest = folder / "step-000004-a1/manifest.json"
    manifest: Any = json.loads(newest.read_text())
    newest.write_text(json.dumps(manifest | {"earlier": {"step-000003-a1": digest}}))


ATTACKS: Final[dict[str, tuple[Callable[[Path], object], int | None, str]]] = {
    "nothing": (lambda folder: None, 4, "resumed from step 4"),  # noqa: ARG005
    "newest-replaced": (lambda folder: replace(folder / "step-000004-a1"), None, "its manifest was replaced"),
    "all-replaced": (
        lambda folder: [replace(folder / name) for name in ("step-000003-a1", "step-000004-a1")],
        None,
        "its manifest was replaced",
    ),
    "newest-names-a-replaced-one": (name_the_planted_one, None, "its manifest was replaced"),
    "later-attempt-planted": (lambda folder: plant(folder, "step-000004-a9"), 4, "no earlier attempt reported it"),
    "later-step-planted": (
        lambda folder: (folder / "step-000003-a1").rename(folder / "step-000005-a9"),
        4,
        "no earlier attempt reported it",
    ),
    "newest-deleted-and-older-replaced": (
        lambda folder: [shutil.rmtree(folder / "step-000004-a1"), replace(folder / "step-000003-a1")],
        None,
        "no earlier attempt reported it",
    ),
    "newest-damaged": (
        lambda folder: (folder / "step-000004-a1/adapter.safetensors").write_bytes(b"cut"),
        3,
        "does not match size and SHA-256",
    ),
    "newest-damaged-and-older-replaced": (
        lambda folder: [
            (folder / "step-000004-a1/adapter.safetensors").write_bytes(b"cut"),
            replace(folder / "step-000003-a1"),
        ],
        None,
        "its manifest was replaced",
    ),
}


@pytest.mark.parametrize(("attack", "step", "note"), ATTACKS.values(), ids=ATTACKS)
def test_only_reported_checkpoints_are_resumed_from(
    run: Run, attack: Callable[[Path], object], step: int | None, note: str
) -> None:
    attack(run.folder)
    assert run.resume() == ((step, 1.0) if step else None)
    assert any(note in line for line in run.notes), run.notes


def test_chain_of_digests_continues_after_a_resume(run: Run) -> None:
    second = run.attempt(2)
    assert second.load_latest(run.reported[-1]) is not None
    second.save(make_state(5), keep=2)
    (run.folder / "step-000005-a2/adapter.safetensors").write_bytes(b"cut")
    assert run.resume() == (4, 1.0)


def test_checkpoint_that_the_configuration_names_outlives_newer_reports(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Job that its queue suspends starts again with the configuration that it has, unless that was replaced."""
    second, configured = run.attempt(2), run.reported[-1]
    assert second.load_latest(configured) is not None
    for step in (5, 6, 7):
        second.save(make_state(step), keep=1)
        monkeypatch.setattr(DELIVERED, "checkpoint", f"step-{step:06}-a2")
    found = run.attempt(2).load_latest(configured)
    assert found is not None
    assert found.state.step == 4


def test_without_a_reported_digest_the_newest_checkpoint_is_resumed_from(run: Run) -> None:
    replace(run.folder / "step-000004-a1")
    for reported in (None, run.reported[-1].model_copy(update={"digest": None})):
        assert run.attempt(2).load_latest(reported) is not None
    elsewhere = run.reported[-1].model_copy(update={"uri": "file:///other/checkpoints/step-000004-a1"})
    assert run.attempt(2).load_latest(elsewhere) is not None


def test_manifest_replaced_before_another_rank_reads_it_is_refused(run: Run) -> None:
    found = run.attempt(2).load_latest(run.reported[-1])
    assert found is not None
    assert run.attempt(2).load(found.checkpoint_id, found.digest).step == 4
    replace(run.folder / "step-000004-a1")
    with pytest.raises(ValueError, match="its manifest was replaced"):
        run.attempt(2).load(found.checkpoint_id, found.digest)


def status(checkpoint_at: int | None, reported_at: int | None, *started_at: int | None) -> QLoRAJobStatus:
    """Return a status; all times are minutes after the start of the run."""

    def at(minutes: int) -> datetime:
        return STARTED + timedelta(minutes=minutes)

    attempts = tuple(
        Attempt(
            number=number, job=f"a-{number}", reason=Reason.NODE_LOST, started_at=None if start is None else at(start)
        )
        for number, start in enumerate(started_at, start=1)
    )
    checkpoint = None if checkpoint_at is None else Checkpoint(step=1, uri="s3://b/c", time=at(checkpoint_at))
    report = None if reported_at is None else Progress(updated_at=at(reported_at))
    return QLoRAJobStatus(attempts=attempts, checkpoint=checkpoint, last_report=report)


@pytest.mark.parametrize(
    ("status", "known"),
    [
        pytest.param(status(None, None), False, id="first-attempt"),
        pytest.param(status(5, 6, 0), True, id="reported"),
        pytest.param(status(5, None, 0), True, id="only-in-a-termination-message"),
        pytest.param(status(5, 6, 0, 10), False, id="last-attempt-was-never-heard-of"),
        pytest.param(status(5, 11, 0, 10), True, id="last-attempt-reported-but-wrote-none"),
        pytest.param(status(12, 6, 0, 10), True, id="last-attempt-left-a-termination-message"),
        pytest.param(status(5, 6, 0, None), True, id="last-attempt-never-started"),
    ],
)
def test_checkpoint_is_passed_on_unless_the_last_attempt_was_never_heard_of(
    status: QLoRAJobStatus, known: bool
) -> None:
    assert reported_checkpoint(status, len(status.attempts) + 1) == (status.checkpoint if known else None)


@pytest.mark.parametrize(
    ("status", "published"),
    [
        pytest.param(status(None, None), None, id="first-attempt-believes-equal-runs"),
        pytest.param(status(None, 6, 0), (), id="none-was-reported"),
        pytest.param(status(12, 6, 0, 10), (), id="last-attempt-left-a-termination-message"),
        pytest.param(status(None, 6, 0, 10), None, id="last-attempt-was-never-heard-of"),
        pytest.param(status(None, None, 0), None, id="reports-do-not-arrive"),
        pytest.param(status(None, 6, 0, None), (), id="last-attempt-never-started"),
    ],
)
def test_only_reported_results_are_believed_unless_the_last_attempt_was_never_heard_of(
    status: QLoRAJobStatus, published: tuple[ManifestRef, ...] | None
) -> None:
    assert reported_manifests(make_spec(), status) == published
    manifest = ManifestRef(uri="s3://b/d/manifest.json", digest="e" * 64)
    output = OutputStatus(digest="d", prefix="s3://b/d", manifest=manifest)
    known = status.model_copy(update={"output": output})
    assert reported_manifests(make_spec(), known) == (None if published is None else (manifest,))


def test_run_that_overwrites_believes_no_result_before_its_first_attempt() -> None:
    spec = make_spec(output={"ifExists": "Overwrite"})
    assert reported_manifests(spec, QLoRAJobStatus()) == ()
