"""The files of a model or a dataset at one commit, wherever they are: the hub, its mirror, S3 or a folder."""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from qlora_api.reasons import Reason
from qlora_api.runconfig import Platform
from qlora_trainer.errors import RunError
from qlora_trainer.storage.credentials import Secrets
from qlora_trainer.storage.huggingface_hub import Hub, RepoType
from qlora_trainer.storage.local_store import FileStore
from qlora_trainer.storage.open_store import open_store
from qlora_trainer.storage.store import Entry, FieldRef, MissingObjectError, Store

_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_COMMIT_DIGITS: Final = 40
"""A content hash is cut to the length of a git commit, so that both fit wherever a commit does."""
WEIGHTS_SUFFIX: Final = ".safetensors"
_PICKLES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack")
_TEXTS: Final = (".json", ".model", ".txt", ".jinja")
"""Configuration, tokenizer and chat template; code (.py) is never fetched."""


class Snapshot(Protocol):
    """The files of one commit."""

    @property
    def commit(self) -> str:
        """Return the commit, or the content hash of a plain folder."""

    @property
    def files(self) -> tuple[str, ...]:
        """Return the names of all files."""

    def fetch(self, names: Iterable[str], work: Path) -> Path:
        """Bring these files onto this computer and return the folder that holds them."""


@dataclass(frozen=True)
class HubSnapshot:
    """A commit on a hub."""

    hub: Hub
    name: str
    repo_type: RepoType
    commit: str
    files: tuple[str, ...]

    def fetch(self, names: Iterable[str], work: Path) -> Path:
        """Download into the library's cache, which keeps what it has."""
        paths = {
            name: self.hub.download(self.name, self.commit, name, work / "hub", self.repo_type)
            for name in sorted(names)
        }
        name, path = next(iter(paths.items()))
        return path.parents[name.count("/")]


@dataclass(frozen=True)
class StoredSnapshot:
    """A folder of a store; files of this computer are used where they are."""

    store: Store
    folder: str
    commit: str
    files: tuple[str, ...]

    def fetch(self, names: Iterable[str], work: Path) -> Path:
        """Download what is not there yet."""
        if isinstance(self.store, FileStore):
            return self.store.folder / self.folder
        target = work / "snapshots" / self.commit
        for name in names:
            if not (target / name).is_file():
                partial = target / f"{name}.part"
                self.store.download(_join(self.folder, name), partial)
                partial.replace(target / name)
        return target


@dataclass(frozen=True)
class SourceResolver:
    """Where snapshots come from, and with which credentials."""

    platform: Platform
    secrets: Secrets

    def open_store(self, uri: str, field_ref: FieldRef) -> Store:
        """Return the store behind a URI."""
        return open_store(uri, field_ref, self.secrets, self.platform.s3)

    def resolve(self, uri: str, revision: str, field_ref: FieldRef, repo_type: RepoType = "model") -> Snapshot:
        """Return the snapshot of a repository or folder."""
        if not uri.startswith("hf://"):
            return _stored(self.open_store(uri, field_ref), "", commit=None, field_ref=field_ref)
        name = uri.removeprefix("hf://")
        if self.platform.hub_mirror is not None:
            return self._mirrored(self.platform.hub_mirror, name, revision, field_ref, repo_type)
        hub = Hub(field_ref, self.platform.hub_endpoint, self.secrets.of(field_ref.role).get("HF_TOKEN"))
        commit, files = hub.resolve(name, revision, repo_type)
        return HubSnapshot(hub, name, repo_type, commit, files)

    def _mirrored(self, mirror: str, name: str, revision: str, field_ref: FieldRef, repo_type: RepoType) -> Snapshot:
        store = self.open_store(mirror, field_ref)
        repository = f"{repo_type}s--{name.replace('/', '--')}"
        try:
            commit = _mirrored_commit(store, repository, revision)
            return _stored(store, f"{repository}/snapshots/{commit}", commit, field_ref)
        except MissingObjectError as error:
            raise RunError(
                field_ref.not_found,
                f"{field_ref.field}: the hub's mirror {mirror} has no {name} at revision {revision}; synchronise "
                "it, or "
                f"correct the URI or the revision",
            ) from error


def _mirrored_commit(store: Store, repository: str, revision: str) -> str:
    if _COMMIT.fullmatch(revision):
        return revision
    return store.read(f"{repository}/refs/{revision}").decode().strip()


def _stored(store: Store, folder: str, commit: str | None, field_ref: FieldRef) -> StoredSnapshot:
    """List a folder; without a commit its content is hashed into one."""
    entries = store.list(folder)
    if not entries:
        raise MissingObjectError(field_ref.not_found, f"{field_ref.field}: {_join(store.root, folder)} holds no files")
    prefix = f"{folder}/" if folder else ""
    names = tuple(entry.path.removeprefix(prefix) for entry in entries)
    return StoredSnapshot(store, folder, commit or _content_hash(store, entries), names)


def _content_hash(store: Store, entries: Iterable[Entry]) -> str:
    """Hash what the model is made of; a changed README is no other model."""
    relevant = [entry for entry in entries if entry.path.endswith((*_TEXTS, WEIGHTS_SUFFIX))]
    listing = "\n".join(f"{entry.path} {entry.size} {store.fingerprint(entry)}" for entry in relevant)
    return hashlib.sha256(listing.encode()).hexdigest()[:_COMMIT_DIGITS]


def _join(folder: str, name: str) -> str:
    return "/".join(filter(None, (folder, name)))


def weight_files(files: Iterable[str], field_ref: FieldRef) -> tuple[str, ...]:
    """Return the safetensors of the model itself, or raise UnsafeModelFormat or ModelNotFound."""
    # A subfolder holds another format of the same weights (original/, onnx/), and so does consolidated*.
    top = [name for name in files if "/" not in name]
    weights = [name for name in top if name.endswith(WEIGHTS_SUFFIX) and not name.startswith("consolidated")]
    if weights:
        return tuple([name for name in weights if name.startswith("model")] or weights)
    pickles = [name for name in files if name.endswith(_PICKLES)]
    if pickles:
        raise RunError(
            Reason.UNSAFE_MODEL_FORMAT,
            f"{field_ref.field}: the weights are pickle files only ({', '.join(pickles[:3])}), and loading pickle "
            "runs code"
            "; choose a revision with .safetensors files, or convert the weights first",
        )
    raise RunError(Reason.MODEL_NOT_FOUND, f"{field_ref.field}: there are no {WEIGHTS_SUFFIX} files; correct the URI")


def text_files(files: Iterable[str]) -> tuple[str, ...]:
    """Return what describes the model: configuration, tokenizer, templates."""
    return tuple(name for name in files if "/" not in name and name.endswith(_TEXTS))
