"""Checkpoints: the state of a training in the output, each complete or invisible, and the way back from one."""

import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final

import torch
from pydantic import AfterValidator, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from qlora_api.base import ApiModel
from qlora_api.report import ManifestFile, StepRecord, ValidationRecord
from qlora_api.v1alpha1 import Checkpoint
from qlora_trainer.errors import RunError
from qlora_trainer.storage.results import MANIFEST, describe_files
from qlora_trainer.storage.store import Store, sha256_of
from qlora_trainer.training.state import FlatState, History, TrainingState

_ADAPTER: Final = "adapter.safetensors"
_BEST: Final = "best.safetensors"
_OPTIMIZER: Final = "optimizer.safetensors"
_RECORD: Final = "record.json"
_FORMER_OPTIMIZERS: Final = {"paged_adamw": "pagedAdamw", "paged_adamw8bit": "pagedAdamw8bit"}
"""Names in checkpoints that were written before the trainer spelled optimizers as the manifest does."""
_NAME: Final = re.compile(r"step-(?P<step>\d{6,})-a(?P<attempt>\d+)")


class RunFingerprint(ApiModel):
    """What a checkpoint and the run that goes on from it must agree in."""

    digest: str
    """The result's: model, data, recipe, seed."""
    total_steps: int
    rows: int
    """Training rows that are left after tokenisation."""
    optimizer: Annotated[str, AfterValidator(lambda name: _FORMER_OPTIMIZERS.get(name, name))]
    """The kind, whose state another kind cannot read."""
    division: str = ""
    """Strategy and number of the processes that the optimizer's state is divided among; empty where it is whole."""


class CheckpointRecord(ApiModel):
    """The part of a checkpoint that is no tensor."""

    course: RunFingerprint
    started_at: datetime
    """When the first attempt started."""
    peak_memory_bytes: int = 0
    """The highest of all attempts so far."""
    steps: tuple[StepRecord, ...]
    held_out: tuple[ValidationRecord, ...]
    optimizer: dict[str, float | int | bool | None]
    scaler: dict[str, float]


class CheckpointManifest(ApiModel):
    """manifest.json of a checkpoint, written last: who finds it finds every file."""

    step: int
    time: datetime
    """When every file was there."""
    verified: bool
    """Whether the store confirmed the SHA-256 of every file."""
    files: tuple[ManifestFile, ...]


@dataclass(frozen=True, order=True)
class CheckpointId:
    """The folder of a checkpoint; attempts that overlap never write the same object, since each has its number in it.

    The later place is the newer one: of two attempts at one step, that of the later attempt.
    """

    step: int
    attempt: int

    @property
    def name(self) -> str:
        """Return the folder's name."""
        return f"step-{self.step:06}-a{self.attempt}"

    @classmethod
    def parse(cls, name: str) -> "CheckpointId | None":
        """Return the place of a folder's name; None where it is none of ours."""
        match = _NAME.fullmatch(name)
        return cls(int(match["step"]), int(match["attempt"])) if match else None


@dataclass(frozen=True)
class CheckpointCallbacks:
    """Who is told what becomes of checkpoints."""

    note: Callable[[str], None]
    """Called with what a person should know."""
    on_complete: Callable[[Checkpoint], None]
    """Called with each checkpoint that a run can go on from, the newest last."""


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint that a run goes on from."""

    checkpoint_id: CheckpointId
    state: TrainingState


class CheckpointStore:
    """The checkpoints of one result, in <digest>/checkpoints/step-000123-a2/."""

    def __init__(
        self,
        output: Store,
        fingerprint: RunFingerprint,
        attempt: int,
        started: datetime,
        callbacks: CheckpointCallbacks,
    ) -> None:
        self.started_at = started
        """When the run started; that of the first attempt, once its checkpoint was found."""
        self.peak_memory_bytes = 0
        """The highest of earlier attempts, once their checkpoint was found."""
        self._output = output
        self._fingerprint = fingerprint
        self._attempt = attempt
        self._callbacks = callbacks
        self._folder = f"{fingerprint.digest}/checkpoints"

    def load_latest(self) -> LoadedCheckpoint | None:
        """Return the newest state that is whole and of this course; what is not is named and passed over."""
        folders = self._folders()
        # A run on one computer counts no attempts, and must not write where an earlier one did either.
        self._attempt = max([self._attempt, *(place.attempt + 1 for place in _parse_ids(folders))])
        for name in sorted(folders, key=_sort_key, reverse=True):
            try:
                found = self._load_folder(name, folders[name])
            except (RunError, ValidationError, SafetensorError, ValueError) as error:
                self._callbacks.note(f"the checkpoint {self._folder}/{name} is passed over: {error}")
                continue
            step = found.checkpoint_id.step
            self._callbacks.note(
                f"going on after step {step}, from the checkpoint {self._output.root}/{self._path(name)}"
            )
            return found
        return None

    def load(self, checkpoint_id: CheckpointId) -> TrainingState:
        """Return the state that another process found."""
        return self._load(checkpoint_id)[1]

    def save(self, state: TrainingState, keep: int) -> None:
        """Write a state, and remove all but the newest so many; the manifest comes last."""
        place = CheckpointId(state.step, self._attempt)
        with tempfile.TemporaryDirectory() as folder:
            self._write(state, Path(folder))
            files = describe_files(Path(folder))
            confirmed = [
                self._output.put(f"{self._path(place.name)}/{file.path}", Path(folder, file.path)) for file in files
            ]
        now = datetime.now(UTC).replace(microsecond=0)
        manifest = CheckpointManifest(step=place.step, time=now, verified=all(confirmed), files=files)
        self._output.put(f"{self._path(place.name)}/{MANIFEST}", manifest.model_dump_json(by_alias=True).encode())
        self._callbacks.on_complete(self._describe(place, manifest))
        self._prune(place, keep)

    def delete_all(self) -> None:
        """Remove every checkpoint; the published adapter has taken their place."""
        try:
            for name in self._folders():
                self._remove(name)
        except RunError as error:
            self._log_prune_failure(error)

    def _path(self, name: str) -> str:
        return f"{self._folder}/{name}"

    def _folders(self) -> dict[str, bool]:
        """Return the name of each folder, and whether its manifest is there."""
        found: dict[str, bool] = {}
        for entry in self._output.list(self._folder):
            name, _, file = entry.path.removeprefix(f"{self._folder}/").partition("/")
            found[name] = found.get(name, False) or file == MANIFEST
        return found

    def _load_folder(self, name: str, complete: bool) -> LoadedCheckpoint:
        place = CheckpointId.parse(name)
        if place is None:
            raise ValueError("it is none of this program's")
        if not complete:
            raise ValueError("it has no manifest, so that it was never complete")
        manifest, state = self._load(place)
        self._callbacks.on_complete(self._describe(place, manifest))
        return LoadedCheckpoint(place, state)

    def _describe(self, checkpoint_id: CheckpointId, manifest: CheckpointManifest) -> Checkpoint:
        uri = f"{self._output.root}/{self._path(checkpoint_id.name)}"
        return Checkpoint(step=checkpoint_id.step, uri=uri, time=manifest.time, verified=manifest.verified)

    def _prune(self, newest: CheckpointId, keep: int) -> None:
        """Remove older checkpoints, and what earlier attempts left incomplete."""
        try:
            folders = self._folders()
            # Later ones are those that were passed over; they must not crowd out what this run can go on from.
            usable = sorted(place for place in _parse_ids(folders) if folders[place.name] and place <= newest)
            partial = [place for place in _parse_ids(folders) if not folders[place.name] and _is_stale(place, newest)]
            for place in [*usable[:-keep], *partial]:
                self._remove(place.name)
        except RunError as error:
            self._log_prune_failure(error)

    def _log_prune_failure(self, error: RunError) -> None:
        self._callbacks.note(f"old checkpoints stay in {self._output.root}/{self._folder}: {error}")

    def _write(self, state: TrainingState, folder: Path) -> None:
        save_file(dict(state.weights), folder / _ADAPTER)
        save_file(dict(state.best), folder / _BEST)
        tensors = {name: value for name, value in state.optimizer.items() if isinstance(value, torch.Tensor)}
        save_file(tensors, folder / _OPTIMIZER)
        record = CheckpointRecord(
            course=self._fingerprint,
            started_at=self.started_at,
            peak_memory_bytes=max(self.peak_memory_bytes, state.peak_memory_bytes),
            steps=tuple(state.history.steps),
            held_out=tuple(state.history.validations),
            optimizer={name: value for name, value in state.optimizer.items() if not isinstance(value, torch.Tensor)},
            scaler=dict(state.scaler),
        )
        (folder / _RECORD).write_text(record.model_dump_json(by_alias=True))

    def _load(self, checkpoint_id: CheckpointId) -> tuple[CheckpointManifest, TrainingState]:
        path = self._path(checkpoint_id.name)
        manifest = CheckpointManifest.model_validate_json(self._output.read(f"{path}/{MANIFEST}"))
        with tempfile.TemporaryDirectory() as folder:
            for file in manifest.files:
                self._fetch(path, file, Path(folder))
            record = CheckpointRecord.model_validate_json(Path(folder, _RECORD).read_bytes())
            check_fingerprint(record.course, self._fingerprint)
            optimizer: FlatState = {**record.optimizer, **load_file(Path(folder, _OPTIMIZER))}
            weights, best = load_file(Path(folder, _ADAPTER)), load_file(Path(folder, _BEST))
        self.started_at, self.peak_memory_bytes = record.started_at, record.peak_memory_bytes
        history = History(record.steps, record.held_out)
        return manifest, TrainingState(history, weights, optimizer, record.scaler, best)

    def _fetch(self, path: str, file: ManifestFile, folder: Path) -> None:
        target = folder / file.path
        self._output.download(f"{path}/{file.path}", target)
        if sha256_of(target) != file.sha256:
            raise ValueError(f"{file.path} is not what its manifest says")

    def _remove(self, name: str) -> None:
        """Remove the manifest first, so that no reader finds half a checkpoint."""
        self._output.delete(f"{self._path(name)}/{MANIFEST}")
        for entry in self._output.list(self._path(name)):
            self._output.delete(entry.path)


def _parse_ids(names: Iterable[str]) -> Iterator[CheckpointId]:
    return (place for name in names if (place := CheckpointId.parse(name)) is not None)


def _sort_key(name: str) -> CheckpointId:
    """Return the place to sort a name by; what has none comes first of all."""
    return CheckpointId.parse(name) or CheckpointId(-1, 0)


def _is_stale(checkpoint_id: CheckpointId, newest: CheckpointId) -> bool:
    """Return whether nobody writes a place any more, or what is written there is of no use."""
    return checkpoint_id.attempt < newest.attempt and checkpoint_id.step <= newest.step


def check_fingerprint(found: RunFingerprint, wanted: RunFingerprint) -> None:
    """Refuse the state of another course: its learning rates and its rows would be none of this run's (trap 37)."""
    was, now = found.model_dump(by_alias=True), wanted.model_dump(by_alias=True)
    differing = [f"{name} was {was[name]} and is {now[name]}" for name in was if was[name] != now[name]]
    if differing:
        raise ValueError(f"it belongs to another course of training: {', '.join(differing)}")
