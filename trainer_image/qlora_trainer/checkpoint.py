"""Checkpoints: the state of a training in the output, each complete or invisible, and the way back from one."""

import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Final

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from qlora_api.base import ApiModel
from qlora_api.report import HeldOutRecord, ManifestFile, StepRecord
from qlora_api.v1alpha1 import CheckpointSpec, to_timedelta
from qlora_trainer.errors import RunError
from qlora_trainer.history import History
from qlora_trainer.output import MANIFEST
from qlora_trainer.publish import describe_files
from qlora_trainer.state import Flat, TrainingState
from qlora_trainer.store import Store, sha256_of

_ADAPTER: Final = "adapter.safetensors"
_BEST: Final = "best.safetensors"
_OPTIMIZER: Final = "optimizer.safetensors"
_RECORD: Final = "record.json"


class Course(ApiModel):
    """What a checkpoint and the run that goes on from it must agree in."""

    digest: str
    """The result's: model, data, recipe, seed."""
    total_steps: int
    rows: int
    """Training rows that are left after tokenisation."""
    optimizer: str
    """The kind, whose state another kind cannot read."""
    division: str = ""
    """Strategy and number of the processes that the optimizer's state is divided among; empty where it is whole."""


class Record(ApiModel):
    """The part of a checkpoint that is no tensor."""

    course: Course
    started_at: datetime
    """When the first attempt started."""
    peak_memory_bytes: int = 0
    """The highest of all attempts so far."""
    steps: tuple[StepRecord, ...]
    held_out: tuple[HeldOutRecord, ...]
    optimizer: dict[str, float | int | bool | None]
    scaler: dict[str, float]


class CheckpointManifest(ApiModel):
    """manifest.json of a checkpoint, written last: who finds it finds every file."""

    step: int
    files: tuple[ManifestFile, ...]


class Checkpoints:
    """The checkpoints of one result, in <digest>/checkpoints/step-000123/."""

    def __init__(
        self, output: Store, course: Course, spec: CheckpointSpec, started: datetime, note: Callable[[str], None]
    ) -> None:
        self.started_at = started
        """When the run started; that of the first attempt, once its checkpoint was found."""
        self.peak_memory_bytes = 0
        """The highest of earlier attempts, once their checkpoint was found."""
        self._output = output
        self._course = course
        self._spec = spec
        self._note = note
        self._folder = f"{course.digest}/checkpoints"
        self._saved_step = 0
        self._saved_at = time.monotonic()

    def newest(self) -> TrainingState | None:
        """Return the newest state that is whole and of this course; what is not is named and passed over."""
        for place in reversed(self._places()):
            try:
                state = self._load(place)
            except (RunError, ValidationError, SafetensorError, ValueError) as error:
                self._note(f"the checkpoint {place} is passed over: {error}")
                continue
            self._saved_step = len(state.history.steps)
            self._note(f"going on after step {self._saved_step}, from the checkpoint {self._output.root}/{place}")
            return state
        return None

    def at(self, step: int) -> TrainingState:
        """Return the state after a step that another process found."""
        return self._load(f"{self._folder}/step-{step:06}")

    def wants(self, step: int, last: bool) -> bool:
        """Return whether to keep the state after a step: it is time to, or there will be no other occasion."""
        return step != self._saved_step and (last or self._is_due(step))

    def keep(self, state: TrainingState) -> None:
        """Save a state."""
        try:
            self._save(state)
        except RunError as error:
            # The training is worth more than its insurance; the next occasion tries again.
            self._note(f"no checkpoint of step {len(state.history.steps)} was written: {error}")

    def clear(self) -> None:
        """Remove every checkpoint; the published adapter has taken their place."""
        self._remove(self._places())

    def _is_due(self, step: int) -> bool:
        if self._spec.steps is not None:
            return step - self._saved_step >= self._spec.steps
        return time.monotonic() - self._saved_at >= to_timedelta(self._spec.every).total_seconds()

    def _places(self) -> tuple[str, ...]:
        """Return the folder of each complete checkpoint, the newest last."""
        paths = (entry.path for entry in self._output.list(self._folder))
        return tuple(
            sorted((path.removesuffix(f"/{MANIFEST}") for path in paths if path.endswith(MANIFEST)), key=_step_of)
        )

    def _save(self, state: TrainingState) -> None:
        step = len(state.history.steps)
        place = f"{self._folder}/step-{step:06}"
        with tempfile.TemporaryDirectory() as folder:
            self._write(state, Path(folder))
            manifest = CheckpointManifest(step=step, files=describe_files(Path(folder)))
            for file in manifest.files:
                self._output.put(f"{place}/{file.path}", Path(folder, file.path))
        self._output.put(f"{place}/{MANIFEST}", manifest.model_dump_json(by_alias=True).encode())
        self._saved_step, self._saved_at = step, time.monotonic()
        # Later ones are those that were passed over; they must not crowd out what this run can go on from.
        usable = [found for found in self._places() if _step_of(found) <= step]
        self._remove(usable[: -self._spec.keep])

    def _write(self, state: TrainingState, folder: Path) -> None:
        save_file(dict(state.weights), folder / _ADAPTER)
        save_file(dict(state.best), folder / _BEST)
        tensors = {name: value for name, value in state.optimizer.items() if isinstance(value, torch.Tensor)}
        save_file(tensors, folder / _OPTIMIZER)
        record = Record(
            course=self._course,
            started_at=self.started_at,
            peak_memory_bytes=max(self.peak_memory_bytes, state.peak_memory_bytes),
            steps=tuple(state.history.steps),
            held_out=tuple(state.history.held_out),
            optimizer={name: value for name, value in state.optimizer.items() if not isinstance(value, torch.Tensor)},
            scaler=dict(state.scaler),
        )
        (folder / _RECORD).write_text(record.model_dump_json(by_alias=True))

    def _load(self, place: str) -> TrainingState:
        manifest = CheckpointManifest.model_validate_json(self._output.read(f"{place}/{MANIFEST}"))
        with tempfile.TemporaryDirectory() as folder:
            for file in manifest.files:
                self._fetch(place, file, Path(folder))
            record = Record.model_validate_json(Path(folder, _RECORD).read_bytes())
            check_course(record.course, self._course)
            optimizer: Flat = {**record.optimizer, **load_file(Path(folder, _OPTIMIZER))}
            weights, best = load_file(Path(folder, _ADAPTER)), load_file(Path(folder, _BEST))
        self.started_at, self.peak_memory_bytes = record.started_at, record.peak_memory_bytes
        return TrainingState(History(record.steps, record.held_out), weights, optimizer, record.scaler, best)

    def _fetch(self, place: str, file: ManifestFile, folder: Path) -> None:
        target = folder / file.path
        self._output.download(f"{place}/{file.path}", target)
        if sha256_of(target) != file.sha256:
            raise ValueError(f"{file.path} is not what its manifest says")

    def _remove(self, places: Sequence[str]) -> None:
        """Remove the manifest first, so that no reader finds half a checkpoint."""
        try:
            for place in places:
                self._output.delete(f"{place}/{MANIFEST}")
                for entry in self._output.list(place):
                    self._output.delete(entry.path)
        except RunError as error:
            self._note(f"old checkpoints stay in {self._output.root}/{self._folder}: {error}")


def _step_of(place: str) -> int:
    return int(place.rpartition("-")[2])


def check_course(found: Course, wanted: Course) -> None:
    """Refuse the state of another course: its learning rates and its rows would be none of this run's (trap 37)."""
    was, now = found.model_dump(by_alias=True), wanted.model_dump(by_alias=True)
    differing = [f"{name} was {was[name]} and is {now[name]}" for name in was if was[name] != now[name]]
    if differing:
        raise ValueError(f"it belongs to another course of training: {', '.join(differing)}")
