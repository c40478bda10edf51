"""Checkpoints of a training run in its output: uploaded with the manifest last, verified before a run resumes."""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final, Literal

import torch
from pydantic import AfterValidator, AwareDatetime
from safetensors.torch import load_file, save_file

from qlora_api.base import ApiModel, Sha256
from qlora_api.foreign_files import read_file
from qlora_api.report import MAX_MANIFEST_BYTES, StepRecord, ValidationRecord
from qlora_api.tolerant_reader import ignore_unknown
from qlora_api.units import KIB, MIB
from qlora_api.v1alpha1 import Checkpoint
from qlora_trainer.errors import RunError
from qlora_trainer.evaluation.base_evaluation import BASE_EVALUATION
from qlora_trainer.observability.progress import DELIVERED
from qlora_trainer.storage.listed_files import describe_files, download_listed
from qlora_trainer.storage.results import (
    MANIFEST,
)
from qlora_trainer.storage.store import Store, is_unavailable, sha256_of
from qlora_trainer.training.checkpoint_manifest import CheckpointId, CheckpointManifest, Digests, check_digest
from qlora_trainer.training.state import FlatState, History, TrainingState

_ADAPTER: Final = "adapter.safetensors"
_BEST: Final = "best.safetensors"
_OPTIMIZER: Final = "optimizer.safetensors"
_RECORD: Final = "record.json"
_FORMER_OPTIMIZERS: Final = {"paged_adamw": "pagedAdamw", "paged_adamw8bit": "pagedAdamw8bit"}
"""Optimizer names in older checkpoints, mapped to the spelling of the spec."""
_FILES: Final = frozenset({_ADAPTER, _BEST, _OPTIMIZER, _RECORD})
"""What a checkpoint consists of; a manifest that lists other files is none of ours."""
_MAX_ATTEMPT: Final = 10**8
"""Attempts above are not counted: nothing of ours is numbered so high, and the next number must still be a name."""
_MAX_OPTIMIZER_BYTES: Final = 64 * MIB
"""Upper bound of the optimizer's numbers in record.json: about 300 bytes for each of 200,000 weights."""
_MAX_STEP_BYTES: Final = KIB
"""Upper bound of a step in record.json; it takes about 150 bytes, and a validation about as much."""


class RunFingerprint(ApiModel):
    """What must be equal in a checkpoint and in the run that resumes from it."""

    digest: str
    """Digest of the result: model, data, training settings, seed."""
    total_steps: int
    rows: int
    """Training rows after tokenization."""
    optimizer: Annotated[str, AfterValidator(lambda name: _FORMER_OPTIMIZERS.get(name, name))]
    """The optimizer's name; another optimizer cannot read its state."""
    division: str = ""
    """Strategy and number of processes that the optimizer state is sharded over; empty if it is not sharded."""


class CheckpointRecord(ApiModel):
    """record.json: everything in a checkpoint that is not a tensor."""

    course: RunFingerprint
    started_at: AwareDatetime
    """When the first attempt started."""
    peak_memory_bytes: int = 0
    """Maximum over all attempts so far."""
    steps: tuple[StepRecord, ...]
    held_out: tuple[ValidationRecord, ...]
    optimizer: dict[str, float | int | bool | None]
    scaler: dict[str, float]


@dataclass(frozen=True)
class CheckpointCallbacks:
    """Callbacks for checkpoint events."""

    note: Callable[[str], None]
    """Called with log messages."""
    on_complete: Callable[[Checkpoint], None]
    """Called with each checkpoint that a run can resume from, newest last."""


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint that a run resumes from."""

    checkpoint_id: CheckpointId
    digest: str
    """SHA-256 of its manifest."""
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
        """When the first attempt started; known after `load_latest`, until then the start of this attempt."""
        self.peak_memory_bytes = 0
        """Maximum over earlier attempts; known after `load_latest`."""
        self.base_evaluation: Sha256 | Literal[""] = ""
        """SHA-256 of the evaluation of the base, for the manifests."""
        self.trusted_base_evaluation: str | None = None
        """SHA-256 that the manifest of the checkpoint that the run resumes from names; known after `load_latest`. None
        if no checkpoint was reported, so that any is accepted."""
        self._output = output
        self._fingerprint = fingerprint
        self._attempt = attempt
        self._callbacks = callbacks
        self._folder = f"{fingerprint.digest}/checkpoints"
        self._resumed_from = ""
        """Folder name of the reported checkpoint that this run resumed from, or of one that it named."""
        self._digests: dict[str, str] = {}
        """SHA-256 of the manifests of the checkpoints that this run wrote or resumed from, by folder name."""

    def load_latest(self, reported: Checkpoint | None = None) -> LoadedCheckpoint | None:
        """Return the newest intact checkpoint with the same fingerprint; others are logged and skipped.

        Args:
            reported: The newest checkpoint that an earlier attempt reported. If its digest is known, only it and the
                earlier ones that its manifest names are loaded: anybody who can write the bucket can add others.

        Returns:
            None if the run starts from step 0.

        Raises:
            RunError: The store failed, so that an intact checkpoint may be there. One with anything wrong in it is
                logged and skipped.

        """
        folders, trusted = self._folders(), self._trusted_digests(reported)
        self.trusted_base_evaluation = None if trusted is None else ""
        # Outside a cluster every attempt has number 1, but must not write into the folder of an earlier one.
        earlier = (found.attempt + 1 for found in _parse_ids(folders) if found.attempt < _MAX_ATTEMPT)
        self._attempt = max([self._attempt, *earlier])
        for name in sorted(folders, key=_sort_key, reverse=True):
            try:
                found = self._load_folder(name, folders[name], trusted)
            except Exception as error:  # others write here too, and pydantic, safetensors and torch raise many types
                if is_unavailable(error):
                    raise
                self._callbacks.note(f"checkpoint {self._folder}/{name} skipped: {error}")
                continue
            step = found.checkpoint_id.step
            self._resumed_from = name if trusted is not None else ""
            self._callbacks.note(f"resumed from step {step}, checkpoint {self._output.root}/{self._path(name)}")
            return found
        return None

    def load(self, checkpoint_id: CheckpointId, digest: str) -> TrainingState:
        """Load the checkpoint that the main process chose, on the other ranks.

        Args:
            checkpoint_id: Its step and attempt.
            digest: SHA-256 of the manifest that the main process read; it may have been replaced since.

        Raises:
            RunError: The store failed.
            ValueError: The manifest, a file or the fingerprint does not match.

        """
        manifest, _ = self._read_manifest(checkpoint_id, {checkpoint_id.name: digest})
        return self._load(checkpoint_id, manifest)

    def save(self, state: TrainingState, keep: int) -> None:
        """Upload a checkpoint, manifest last, and prune older ones.

        Args:
            state: The state to save.
            keep: Number of complete checkpoints that remain; at least 1.

        Raises:
            RunError: The upload failed. A failure to prune is only logged.

        """
        checkpoint_id = CheckpointId(state.step, self._attempt)
        with tempfile.TemporaryDirectory() as folder:
            self._write(state, Path(folder))
            files = describe_files(Path(folder))
            confirmed = [
                self._output.put(f"{self._path(checkpoint_id.name)}/{file.path}", file.path.below(Path(folder)))
                for file in files
            ]
        now = datetime.now(UTC).replace(microsecond=0)
        earlier = dict(sorted(self._digests.items(), key=lambda item: _sort_key(item[0]))[-keep:])
        manifest = CheckpointManifest(
            step=checkpoint_id.step,
            time=now,
            verified=all(confirmed),
            files=files,
            earlier=earlier,
            base_evaluation=self.base_evaluation,
        )
        content = manifest.model_dump_json(by_alias=True).encode()
        self._output.put(f"{self._path(checkpoint_id.name)}/{MANIFEST}", content)
        self._digests = {**earlier, checkpoint_id.name: sha256_of(content)}
        self._callbacks.on_complete(self._describe(checkpoint_id, manifest, sha256_of(content)))
        self._prune(checkpoint_id, keep)

    def delete_all(self) -> None:
        """Delete all checkpoints, and the evaluation of the base, once the adapter is published.

        Failures are only logged.
        """
        try:
            for name in dict.fromkeys(name for name, _ in self._files()):
                self._remove(name)
        except RunError as error:
            self._log_prune_failure(error)

    def _path(self, name: str) -> str:
        return f"{self._folder}/{name}"

    def _folders(self) -> dict[str, bool]:
        """Return the folder name of each checkpoint, and whether the folder has a manifest."""
        found: dict[str, bool] = {}
        for name, file in self._files():
            if name != BASE_EVALUATION:
                found[name] = found.get(name, False) or file == MANIFEST
        return found

    def _files(self) -> Iterator[tuple[str, str]]:
        """Yield the folder name and the name of each file."""
        for entry in self._output.list(self._folder, self._callbacks.note):
            name, _, file = entry.path.removeprefix(f"{self._folder}/").partition("/")
            yield name, file

    def _trusted_digests(self, reported: Checkpoint | None) -> dict[str, str] | None:
        """Return the digest of the reported checkpoint by its name; None if there is none, or it is of another run."""
        folder, _, name = reported.uri.rpartition("/") if reported else ("", "", "")
        own = folder == f"{self._output.root}/{self._folder}"
        return {name: reported.digest} if own and reported is not None and reported.digest else None

    def _load_folder(self, name: str, complete: bool, trusted: dict[str, str] | None) -> LoadedCheckpoint:
        checkpoint_id = CheckpointId.parse(name)
        if checkpoint_id is None:
            raise ValueError("its name is not step-NNNNNN-aN")
        if not complete:
            raise ValueError("it has no manifest.json, so it is incomplete")
        manifest, digest = self._read_manifest(checkpoint_id, trusted)
        if trusted is not None:
            trusted.update(manifest.earlier)
        state = self._load(checkpoint_id, manifest)
        self.trusted_base_evaluation = None if trusted is None else manifest.base_evaluation
        self._digests = {**manifest.earlier, name: digest}
        self._callbacks.on_complete(self._describe(checkpoint_id, manifest, digest))
        return LoadedCheckpoint(checkpoint_id, digest, state)

    def _describe(self, checkpoint_id: CheckpointId, manifest: CheckpointManifest, digest: str) -> Checkpoint:
        uri = f"{self._output.root}/{self._path(checkpoint_id.name)}"
        return Checkpoint(
            step=checkpoint_id.step, uri=uri, time=manifest.time, verified=manifest.verified, digest=digest
        )

    def _prune(self, newest: CheckpointId, keep: int) -> None:
        """Delete older checkpoints, and incomplete ones of earlier attempts."""
        try:
            folders = self._folders()
            # Newer ones were skipped on load; they must not displace checkpoints that this run can resume from.
            usable = sorted(found for found in _parse_ids(folders) if folders[found.name] and found <= newest)
            partial = [found for found in _parse_ids(folders) if not folders[found.name] and _is_stale(found, newest)]
            # The operator names the last one that it heard of to the next start, which believes no newer one; or the
            # one of this start, if it could not replace that.
            named = {DELIVERED.checkpoint, self._resumed_from}
            for found in [*usable[:-keep], *partial]:
                if found.name not in named:
                    self._remove(found.name)
        except RunError as error:
            self._log_prune_failure(error)

    def _log_prune_failure(self, error: RunError) -> None:
        self._callbacks.note(f"old checkpoints in {self._output.root}/{self._folder} were not deleted: {error}")

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

    def _read_manifest(self, checkpoint_id: CheckpointId, trusted: Digests | None) -> tuple[CheckpointManifest, str]:
        """Return a manifest and its SHA-256."""
        path = f"{self._path(checkpoint_id.name)}/{MANIFEST}"
        content = self._output.read(path, MAX_MANIFEST_BYTES)
        check_digest(checkpoint_id.name, sha256_of(content), trusted)
        return ignore_unknown(CheckpointManifest, content, path), sha256_of(content)

    def _load(self, checkpoint_id: CheckpointId, manifest: CheckpointManifest) -> TrainingState:
        self._check_files(manifest)
        path = self._path(checkpoint_id.name)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            download_listed(self._output, path, manifest.files, folder)
            content = read_file(folder / _RECORD, self._max_record_bytes)
            record = ignore_unknown(CheckpointRecord, content, f"{path}/{_RECORD}")
            check_fingerprint(record.course, self._fingerprint)
            check_steps(record.steps, checkpoint_id.step)
            optimizer: FlatState = {**record.optimizer, **load_file(folder / _OPTIMIZER)}
            weights, best = load_file(folder / _ADAPTER), load_file(folder / _BEST)
        self.started_at, self.peak_memory_bytes = record.started_at, record.peak_memory_bytes
        history = History(record.steps, record.held_out)
        return TrainingState(history, weights, optimizer, record.scaler, best)

    @property
    def _max_record_bytes(self) -> int:
        return _MAX_OPTIMIZER_BYTES + _MAX_STEP_BYTES * self._fingerprint.total_steps

    def _check_files(self, manifest: CheckpointManifest) -> None:
        """Raise ValueError unless the manifest lists the files of a checkpoint, each once, with a record to read."""
        sizes: dict[str, int] = {file.path: file.size for file in manifest.files}
        if sizes.keys() != _FILES or len(manifest.files) != len(_FILES):
            raise ValueError(f"its manifest lists {', '.join(sorted(sizes)[:8])} and not {', '.join(sorted(_FILES))}")
        if sizes[_RECORD] > self._max_record_bytes:
            raise ValueError(f"its {_RECORD} has {sizes[_RECORD]} bytes, too many for this run's steps")

    def _remove(self, name: str) -> None:
        """Delete the manifest first, so that no reader sees a partial checkpoint."""
        self._output.delete(f"{self._path(name)}/{MANIFEST}")
        for entry in self._output.list(self._path(name), self._callbacks.note):
            self._output.delete(entry.path)


def _parse_ids(names: Iterable[str]) -> Iterator[CheckpointId]:
    return (found for name in names if (found := CheckpointId.parse(name)) is not None)


def _sort_key(name: str) -> CheckpointId:
    """Return the sort key of a folder name; names that do not parse sort first."""
    return CheckpointId.parse(name) or CheckpointId(-1, 0)


def _is_stale(checkpoint_id: CheckpointId, newest: CheckpointId) -> bool:
    """Return whether an incomplete checkpoint of an earlier attempt is no longer needed."""
    return checkpoint_id.attempt < newest.attempt and checkpoint_id.step <= newest.step


def check_steps(steps: Sequence[StepRecord], last: int) -> None:
    """Raise ValueError unless there is one record per step, up to the last one."""
    if [record.step for record in steps] != list(range(1, last + 1)):
        raise ValueError(f"its record has not exactly the steps from 1 to {last}")


def check_fingerprint(found: RunFingerprint, wanted: RunFingerprint) -> None:
    """Refuse the state of a run with other settings: its learning rates and rows would not fit this run (trap 37).

    Raises:
        ValueError: The fields differ; the message names each with both values.

    """
    was, now = found.model_dump(by_alias=True), wanted.model_dump(by_alias=True)
    differing = [f"{name} was {was[name]} and is {now[name]}" for name in was if was[name] != now[name]]
    if differing:
        raise ValueError(f"it was saved by a run with other settings: {', '.join(differing)}")
