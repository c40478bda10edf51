"""Files of a model or dataset at one commit, from the Hub, its mirror, S3 or a folder."""

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from qlora_api.foreign_files import read_object, read_start
from qlora_api.model_config import MAX_TOKENIZER_CONFIG_BYTES
from qlora_api.object_names import ObjectName
from qlora_api.prepared import COMMIT
from qlora_api.reasons import Reason
from qlora_api.runconfig import Platform
from qlora_api.units import MIB
from qlora_api.untrusted_json import InvalidJsonError
from qlora_trainer.errors import RunError
from qlora_trainer.storage.credentials import Secrets
from qlora_trainer.storage.huggingface_hub import Hub, RepoType
from qlora_trainer.storage.local_store import FileStore
from qlora_trainer.storage.open_store import open_store
from qlora_trainer.storage.store import LFS_POINTER, Entry, FieldRef, MissingObjectError, Store

_COMMIT_DIGITS: Final = 40
"""Content hashes are cut to the length of a git commit, to fit wherever a commit does."""
_MAX_REF_BYTES: Final = 256
"""A ref has a commit and a newline."""
WEIGHTS_SUFFIX: Final = ".safetensors"
PICKLES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack")
_TEXTS: Final = (".json", ".model", ".txt", ".jinja")
"""Configuration, tokenizer and chat template; code (.py) is never downloaded."""
_TEXT_NAMES: Final = frozenset({
    "config.json", "generation_config.json", "chat_template.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.json", "vocab.txt", "merges.txt", "tekken.json", "dict.txt", "emoji.json", "byte_maps.json",
    "entity_vocab.json", "normalizer.json", "word_shape.json", "word_pronunciation.json", "vocab-src.json",
    "vocab-tgt.json", "target_vocab.json",
})  # fmt: skip
"""Names that transformers 5 reads for a model or a tokenizer (VOCAB_FILES_NAMES of its tokenizers)."""
_TEXT_FAMILIES: Final = re.compile(r"tokenizer\.[\w.-]*json|\w[\w.-]*\.model|\w[\w.-]*\.safetensors\.index\.json")
"""Tokenizers by their version, SentencePiece models, and indices of weights."""
_OBJECTS: Final = frozenset({"config.json", "generation_config.json", "tokenizer_config.json"})
"""Files that are JSON objects; the errors of their readers name neither file nor cause."""
MAX_TEXT_FILE_BYTES: Final = 128 * MIB
"""Maximum size of such a file: the largest tokenizer.json have 34 MB (Gemma 3), and are expanded in memory."""


class Snapshot(Protocol):
    """The files of one commit."""

    @property
    def commit(self) -> str:
        """Return the commit, or the content hash of a folder."""

    @property
    def files(self) -> tuple[ObjectName, ...]:
        """Return the names of all files."""

    @property
    def etags(self) -> Mapping[str, str]:
        """Return the ETags of the files by name; empty if the store has none, or a hub pins the content."""

    def fetch(self, names: Iterable[str], work: Path) -> Path:
        """Download files, unless they are local.

        Args:
            names: Names relative to the root of the repository.
            work: Folder for downloads.

        Returns:
            The folder that contains the files under their names.

        """

    def read_start(self, name: str, count: int) -> tuple[bytes, int]:
        """Return the first `count` bytes of a file, or all if it has fewer, and its size."""


@dataclass(frozen=True)
class HubSnapshot:
    """A commit on a hub."""

    hub: Hub
    name: str
    repo_type: RepoType
    commit: str
    files: tuple[ObjectName, ...]
    etags: Mapping[str, str] = field(default_factory=dict)

    def fetch(self, names: Iterable[str], work: Path) -> Path:
        """Download files into the library's cache, and return the folder of the commit."""
        paths = {
            name: self.hub.download(self.name, self.commit, name, work / "hub", self.repo_type)
            for name in sorted(names)
        }
        name, path = next(iter(paths.items()))
        return path.parents[name.count("/")]

    def read_start(self, name: str, count: int) -> tuple[bytes, int]:
        """Request the first bytes of a file."""
        return self.hub.read_start(self.name, self.commit, name, count, self.repo_type)


@dataclass(frozen=True)
class StoredSnapshot:
    """A folder of a store; local files are used in place."""

    store: Store
    folder: str
    commit: str
    files: tuple[ObjectName, ...]
    etags: Mapping[str, str] = field(default_factory=dict)

    def fetch(self, names: Iterable[str], work: Path) -> Path:
        """Download missing files, and return their folder."""
        if isinstance(self.store, FileStore):
            return self.store.path_of(self.folder) if self.folder else self.store.folder
        target = ObjectName(self.commit).below(work / "snapshots")
        for name in names:
            file = ObjectName(name).below(target)
            if not file.is_file():
                partial = file.with_name(f"{file.name}.part")
                self.store.download(_join(self.folder, name), partial)
                partial.replace(file)
        return target

    def read_start(self, name: str, count: int) -> tuple[bytes, int]:
        """Request the first bytes of a file."""
        return self.store.read_start(_join(self.folder, name), count)


@dataclass(frozen=True)
class SourceResolver:
    """Resolves URIs to stores and snapshots, with the credentials of the run."""

    platform: Platform
    secrets: Secrets

    def open_store(self, uri: str, field_ref: FieldRef) -> Store:
        """Return the store for a URI."""
        return open_store(uri, field_ref, self.secrets, self.platform.s3)

    def resolve(self, uri: str, revision: str, field_ref: FieldRef, repo_type: RepoType = "model") -> Snapshot:
        """Resolve a repository or folder to a snapshot.

        Args:
            uri: hf://, s3://, pvc:// or file:// URI.
            revision: Branch, tag or commit; only for hf://.
            field_ref: Field of the spec, for messages and credentials.
            repo_type: Kind of repository; only for hf://.

        Raises:
            RunError: The field's not-found reason, or an error of the store or the hub.

        """
        if not uri.startswith("hf://"):
            return _stored(self.open_store(uri, field_ref), "", commit=None, field_ref=field_ref)
        name = uri.removeprefix("hf://")
        if self.platform.hub_mirror is not None:
            return self._mirrored(self.platform.hub_mirror, name, revision, field_ref, repo_type)
        hub = Hub(field_ref, self.platform.hub_endpoint, self.secrets.of(field_ref.role).get("HF_TOKEN"))
        commit, files = hub.resolve(name, revision, repo_type)
        _check_commit(commit, f"{name} at revision {revision}", field_ref)
        return HubSnapshot(hub, name, repo_type, commit, files)

    def _mirrored(self, mirror: str, name: str, revision: str, field_ref: FieldRef, repo_type: RepoType) -> Snapshot:
        store = self.open_store(mirror, field_ref)
        repository = f"{repo_type}s--{name.replace('/', '--')}"
        try:
            commit = _mirrored_commit(store, repository, revision)
            _check_commit(commit, f"{repository}/refs/{revision} of the mirror {mirror}", field_ref)
            return _stored(store, f"{repository}/snapshots/{commit}", commit, field_ref)
        except MissingObjectError as error:
            raise RunError(
                field_ref.not_found,
                f"{field_ref.field}: the hub's mirror {mirror} has no {name} at revision {revision}; "
                "synchronize it, or correct the URI or the revision",
            ) from error


def _mirrored_commit(store: Store, repository: str, revision: str) -> str:
    if COMMIT.fullmatch(revision):
        return revision
    return store.read(f"{repository}/refs/{revision}", _MAX_REF_BYTES).decode(errors="replace").strip()


def _check_commit(commit: str, source: str, field_ref: FieldRef) -> None:
    """Raise RunError unless it is a commit: it becomes a path, and goes into the status and into commands."""
    if not COMMIT.fullmatch(commit):
        raise RunError(
            field_ref.not_found,
            f"{field_ref.field}: {source} does not name a commit but {commit[:_COMMIT_DIGITS]!r}; synchronize it again",
        )


def _stored(store: Store, folder: str, commit: str | None, field_ref: FieldRef) -> StoredSnapshot:
    """List a folder; without a commit, its content hash takes its place."""
    entries = store.list(folder)
    if not entries:
        raise MissingObjectError(field_ref.not_found, f"{field_ref.field}: {_join(store.root, folder)} holds no files")
    etags = {entry.path.relative_to(folder): entry.etag for entry in entries}
    commit = commit or _content_hash(store, entries)
    return StoredSnapshot(store, folder, commit, tuple(etags), {name: etag for name, etag in etags.items() if etag})


def _content_hash(store: Store, entries: Iterable[Entry]) -> str:
    """Hash weights, configuration and tokenizer; a changed README does not make another model."""
    relevant = [entry for entry in entries if entry.path.endswith((*_TEXTS, WEIGHTS_SUFFIX))]
    listing = "\n".join(f"{entry.path} {entry.size} {store.fingerprint(entry)}" for entry in relevant)
    return hashlib.sha256(listing.encode()).hexdigest()[:_COMMIT_DIGITS]


def _join(folder: str, name: str) -> str:
    return "/".join(filter(None, (folder, name)))


def weight_files(files: Iterable[str], field_ref: FieldRef) -> tuple[str, ...]:
    """Return the names of the model's safetensors files.

    Raises:
        RunError: UNSAFE_MODEL_FORMAT if there are only pickle files; MODEL_NOT_FOUND if there are no weights.

    """
    # Subfolders (original/, onnx/) and consolidated* contain the same weights in other formats.
    top = [name for name in files if "/" not in name]
    weights = [name for name in top if name.endswith(WEIGHTS_SUFFIX) and not name.startswith("consolidated")]
    if weights:
        return tuple([name for name in weights if name.startswith("model")] or weights)
    pickles = [name for name in files if name.endswith(PICKLES)]
    if pickles:
        raise RunError(
            Reason.UNSAFE_MODEL_FORMAT,
            f"{field_ref.field}: the weights are pickle files only ({', '.join(pickles[:3])}), and loading pickle "
            "runs code; choose a revision with .safetensors files, or convert the weights first",
        )
    raise RunError(Reason.MODEL_NOT_FOUND, f"{field_ref.field}: there are no {WEIGHTS_SUFFIX} files; correct the URI")


def text_files(files: Iterable[str]) -> tuple[str, ...]:
    """Return the names of configuration, tokenizer and template files that transformers knows; no other is fetched."""
    return tuple(name for name in files if name in _TEXT_NAMES or _TEXT_FAMILIES.fullmatch(name))


def check_text_files(folder: Path, names: Iterable[str], field_ref: FieldRef) -> None:
    """Raise ModelUnsupported if a configuration or tokenizer file is too large to be loaded, or is another file."""
    for name in names:
        if (problem := _problem_of(name, ObjectName(name).below(folder))) is not None:
            raise RunError(Reason.MODEL_UNSUPPORTED, f"{field_ref.field}: {name} {problem}")


def _problem_of(name: str, path: Path) -> str | None:
    """Return why a small file cannot be read, and what to do; None if it can."""
    size = path.stat().st_size
    if size > MAX_TEXT_FILE_BYTES:
        return f"has {size:,} bytes, more than {MAX_TEXT_FILE_BYTES:,}; remove it, or use another model"
    if read_start(path, len(LFS_POINTER)) == LFS_POINTER:
        return "is a pointer of git-lfs; run `git lfs pull` where the model was cloned"
    if name not in _OBJECTS:
        return None
    try:
        read_object(path, MAX_TOKENIZER_CONFIG_BYTES)
    except InvalidJsonError as error:
        return f"is no JSON object ({error.__cause__ or error}); copy the model again"
    return None
