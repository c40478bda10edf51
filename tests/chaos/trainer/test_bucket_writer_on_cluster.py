"""Whoever can write the bucket attacks a run between its steps, with the operator and a real API server in the loop."""

import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import pytest

from qlora_api import names
from qlora_api.names import Phase
from qlora_api.reasons import Reason
from qlora_api.runconfig import Platform
from qlora_api.v1alpha1 import Progress
from qlora_trainer import stages
from qlora_trainer.errors import RunError
from qlora_trainer.inference.published_adapter import open_adapter
from qlora_trainer.runtime.shutdown import StopFlag
from qlora_trainer.storage.credentials import environment_secrets
from qlora_trainer.storage.snapshots import SourceResolver
from tests.chaos.trainer.bucket_attacks import (
    ATTACKS,
    BEFORE_TRAINING,
    INTERRUPTED,
    LOST,
    MODEL_REFUSED,
    OWN_RESULT,
    PUBLISHED,
    REFUSED,
    TRAINING,
)
from tests.chaos.trainer.bucket_writer import CODE, Attacker, forge_result, others
from tests.chaos.trainer.played_pods import PlayedPods
from tests.cluster.cluster import Cluster
from tests.cluster.services.s3 import S3
from tests.integration.operator_process import JobNamespace, Operator, install, open_job_namespace
from tests.unit.trainer.tiny import instruction_rows, write_model, write_rows

BUCKET: Final = "writer-on-cluster"
HONEST: Final = "honest"
SPEC: Final[dict[str, Any]] = {
    "model": {"uri": f"s3://{BUCKET}/model"},
    "dataset": {"uri": f"s3://{BUCKET}/rows.jsonl", "evaluation": {"fraction": 0.2}},
    "lora": {"rank": 4, "alpha": 8},
    "training": {"epochs": 1, "globalBatchSize": 8, "learningRate": 0.01, "maxLength": 64},
    "evaluation": {"generations": 0},
    "checkpoint": {"steps": 1},
    "output": {"uri": f"s3://{BUCKET}/team"},
}


class Scene:
    """A namespace, its operator, and the attacker of the bucket that its runs share."""

    def __init__(self, namespace: JobNamespace, operator: Operator, s3: S3, folder: Path) -> None:
        self.namespace, self.operator, self.folder = namespace, operator, folder
        self.attacker = Attacker(s3, s3.make_bucket(BUCKET))
        write_model(folder / "model")
        write_rows(folder / "rows.jsonl", instruction_rows())
        for path in (folder / "model").iterdir():
            self.attacker.write(f"model/{path.name}", path.read_bytes())
        self.attacker.write("rows.jsonl", (folder / "rows.jsonl").read_bytes())
        honest = self.pods(HONEST)
        self.status = honest.play()
        assert self.status["phase"] == "Succeeded", self.status
        self.published = self.attacker.objects(f"team/{HONEST}/")
        self.weights = self.weights_of(self.status)

    def pods(self, name: str, **acts: Any) -> PlayedPods:
        """Submit a QLoRAJob, and return its pods."""
        self.namespace.submit(name, **SPEC)
        (self.folder / name).mkdir()
        self.attacker.prefix = f"team/{name}/{self.digest}" if name != HONEST else ""
        return PlayedPods(self.namespace, self.operator, self.folder / name, name, **acts)

    @property
    def digest(self) -> str:
        return str(self.status["output"]["digest"])

    def weights_of(self, status: dict[str, Any]) -> bytes:
        """Return the adapter's weights as a consumer gets them."""
        resolver = SourceResolver(Platform(), environment_secrets())
        adapter = open_adapter(resolver, status["output"]["adapter"], "ADAPTER", self.folder / f"consumer-{uuid4()}")
        assert adapter.verified
        return (adapter.folder / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def scene(control_plane: Cluster, s3: S3, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    install(control_plane)
    folder = tmp_path_factory.mktemp("scene")
    with pytest.MonkeyPatch.context() as patch, open_job_namespace(control_plane, "bucket-writer") as namespace:
        for name, value in s3.environment().items():
            patch.setenv(name, value)
        patch.setattr(stages, "load_in_fresh_process", lambda *_: None)  # imports torch; test_run.py covers it
        operator = Operator(control_plane, folder, namespace.namespace).start()
        try:
            yield Scene(namespace, operator, s3, folder)
        finally:
            operator.stop_and_check_log()


def change(scene: Scene, contains: str, new: Callable[[bytes], bytes] = lambda content: content[::-1]) -> None:
    found = scene.attacker.objects(f"{scene.attacker.prefix}/{contains}")
    assert found, contains
    scene.attacker.write_all({key: new(content) for key, content in found.items()})


def delete(scene: Scene, contains: str) -> None:
    for key in scene.attacker.objects(f"{scene.attacker.prefix}/{contains}"):
        scene.attacker.delete(key)


def plant_files(scene: Scene) -> None:
    for key, content in scene.published.items():
        if "/adapter/" in key or "/report/" in key:
            name = key.replace(f"/{HONEST}/", f"/{scene.attacker.prefix.split('/')[1]}/")
            scene.attacker.write(name, others(content) if key.endswith(".safetensors") else CODE)


def forge(scene: Scene) -> None:
    scene.attacker.write_all(forge_result(scene.published, {}, scene.attacker.prefix.split("/")[1]))


def swap_model(scene: Scene) -> None:
    scene.attacker.write("model/model.safetensors", others((scene.folder / "model/model.safetensors").read_bytes()))


ACTS: Final[dict[str, Callable[[Scene], object]]] = {
    "rows-changed": lambda scene: change(scene, "prepared/train"),
    "rows-deleted": lambda scene: delete(scene, "prepared/train"),
    "digests-changed": lambda scene: change(scene, "prepared/inputs"),
    "facts-changed": lambda scene: change(scene, "prepared/prepared.json"),
    "weights-swapped": swap_model,
    "checkpoints-forged": lambda scene: scene.attacker.forge_checkpoints(),
    "checkpoints-deleted": lambda scene: delete(scene, "checkpoints/"),
    "files-planted": plant_files,
    "result-forged": forge,
    "latest-changed": lambda scene: scene.attacker.write(f"{scene.attacker.prefix[:-17]}/latest.json", b'{"digest":'),
    "nothing": lambda _: None,
    "lost-result-forged": forge,
    "lost-result-deleted": lambda scene: delete(scene, "manifest.json"),
    "adapter-changed": lambda scene: change(scene, "adapter/adapter_model.safetensors", others),
    "record-changed": lambda scene: change(scene, "adapter/qlora.json", lambda content: b" " + content),
    "everything-forged": forge,
}


@pytest.fixture(autouse=True)
def model_as_it_was(scene: Scene) -> Iterator[None]:
    yield
    scene.attacker.write("model/model.safetensors", (scene.folder / "model/model.safetensors").read_bytes())


def test_every_attack_is_carried_out() -> None:
    assert ACTS.keys() == ATTACKS.keys()


def once(act: Callable[[], object]) -> Callable[[Progress, StopFlag], object]:
    left = [act]
    return lambda progress, _: left.pop()() if left and progress.phase is Phase.TRAINING and progress.step else None


def stop_after_two_steps(progress: Progress, stop: StopFlag) -> None:
    stop.requested = (progress.step or 0) >= 2


@pytest.mark.timeout(900)
@pytest.mark.parametrize("attack", [name for name, attack in ATTACKS.items() if attack.when != PUBLISHED])
def test_attack_during_a_run_ends_as_the_page_says(scene: Scene, attack: str) -> None:
    act, first, second = partial(ACTS[attack], scene), names.train_job_name(attack, 1), names.train_job_name(attack, 2)
    acts: dict[str, dict[str, Any]] = {
        BEFORE_TRAINING: {"before": {first: act}},
        INTERRUPTED: {"before": {second: act}, "reports": {first: stop_after_two_steps}},
        TRAINING: {"reports": {first: once(act)}},
        LOST: {"lost": {first: act}},
    }
    pods = scene.pods(attack, **acts[ATTACKS[attack].when])
    status = pods.play()
    end = (status["phase"], status["reason"])
    if ATTACKS[attack].end in {REFUSED, MODEL_REFUSED}:
        reason = Reason.INVALID_SPEC if ATTACKS[attack].end == REFUSED else Reason.MODEL_NOT_FOUND
        assert end == ("Failed", reason), status
        return
    assert end == ("Succeeded", "Published" if ATTACKS[attack].end == OWN_RESULT else "AlreadyPublished"), status
    assert scene.weights_of(status) == scene.weights
    assert reported_digest_is_that_of_the_manifest(scene, status)
    if attack == "checkpoints-forged":
        assert any("its manifest was replaced" in note for note in pods.notes), pods.notes


def reported_digest_is_that_of_the_manifest(scene: Scene, status: dict[str, Any]) -> bool:
    manifest = status["output"]["manifest"]
    key = manifest["uri"].removeprefix(f"s3://{BUCKET}/")
    return bool(hashlib.sha256(scene.attacker.objects(key)[key]).hexdigest() == manifest["digest"])


@pytest.mark.timeout(900)
@pytest.mark.parametrize("attack", [name for name, attack in ATTACKS.items() if attack.when == PUBLISHED])
def test_attack_on_a_published_result_is_found_by_its_consumer(scene: Scene, attack: str) -> None:
    status = scene.pods(attack).play()
    assert scene.weights_of(status) == scene.weights
    ACTS[attack](scene)
    assert scene.namespace.status(attack) == status
    if attack == "everything-forged":
        assert not reported_digest_is_that_of_the_manifest(scene, status)
        return
    with pytest.raises(RunError, match=r"does not match size and SHA-256 in its manifest|qlora\.json: "):
        scene.weights_of(status)
