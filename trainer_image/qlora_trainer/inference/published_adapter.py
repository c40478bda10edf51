"""Downloads a published adapter, verified against its manifest, and its base, for merging and chat."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from qlora_api.foreign_files import read_file
from qlora_api.names import CLAIM_SCHEME, SecretRole
from qlora_api.object_names import ObjectName
from qlora_api.reasons import Reason
from qlora_api.report import MAX_MANIFEST_BYTES, AdapterRecord, ManifestFile, ResultManifest
from qlora_api.tolerant_reader import ignore_unknown
from qlora_api.untrusted_json import parse_object
from qlora_trainer.errors import RunError
from qlora_trainer.observability.progress import no_log
from qlora_trainer.storage.listed_files import download_listed
from qlora_trainer.storage.local_store import FileStore
from qlora_trainer.storage.results import (
    MANIFEST,
    RECORD,
    REJECTED_RECORD,
    find_manifest_of,
)
from qlora_trainer.storage.snapshots import PICKLES, Snapshot, SourceResolver, text_files, weight_files
from qlora_trainer.storage.store import FieldRef, MissingObjectError, ObjectTooLargeError, Store, sha256_of

_READABLE: Final = ("file://", "s3://")
_SETTINGS: Final = "adapter_config.json"
"""The file by which peft recognizes an adapter."""
_CODE: Final = (".py", *PICKLES)
"""Suffixes of files that loading would run; an adapter of ours has none."""
_SHOWN_CHARACTERS: Final = 200
"""Of a URI in a message: somebody else's manifest may have one of megabytes."""
_RECORDED_BASE: Final = FieldRef(SecretRole.MODEL, "the adapter's base (--base-model overrides it)")
_GIVEN_BASE: Final = FieldRef(SecretRole.MODEL, "--base-model")


@dataclass(frozen=True)
class PublishedAdapter:
    """An adapter's files, and the record of its training."""

    uri: str
    folder: Path
    record: AdapterRecord
    verified: bool = True
    """Whether a manifest lists its files; without one, they are as somebody left them."""

    @property
    def caveat(self) -> str:
        """Return what to add to a message about an adapter that was not verified; empty for others."""
        if self.verified:
            return ""
        return f"; NOT verified: no {MANIFEST} above it lists its files, so trust its source or give a published one"


def open_adapter(resolver: SourceResolver, uri: str, field: str, work: Path) -> PublishedAdapter:
    """Download an adapter, and verify it if there is a manifest of its result.

    Args:
        resolver: Opens the adapter's store, and those of the folders above it.
        uri: URI of the adapter's folder.
        field: Option that gave the URI.
        work: Folder for downloads.

    Raises:
        RunError: It is not a published adapter, or not the one that its manifest lists.

    """
    if not uri.startswith(_READABLE):
        raise RunError(Reason.INVALID_SPEC, f"{field}: {uri} is neither a folder nor an s3:// URI; download it first")
    store = resolver.open_store(uri, FieldRef(SecretRole.OUTPUT, field))
    record = _read_record(store, field)
    if record.method == "full":
        raise RunError(
            Reason.INVALID_SPEC,
            f"{field}: {store.root} was trained with method full and is a complete model; load it with transformers",
        )
    listed = _find_listed(resolver, store.root, field)
    if listed is None:
        return PublishedAdapter(store.root, _fetch_unverified(store, work), record, verified=False)
    folder = fetch_listed(store, "", listed, work)
    return PublishedAdapter(
        store.root, folder, _parse_record(read_file(folder / RECORD, MAX_MANIFEST_BYTES), store, field)
    )


def parents(uri: str, levels: int = 2) -> tuple[str, ...]:
    """Return the URIs that may be the root of the adapter's result: its parent, its grandparent, and so on."""
    scheme, _, path = uri.partition("://")
    folders = path.split("/")
    above = (folders[:-level] for level in range(1, levels + 1))
    return tuple(f"{scheme}://{'/'.join(names)}" for names in above if any(names))


_MAX_LEVELS: Final = 3
"""Folders between an adapter and the folder of its manifest's paths: rejected/<content>/adapter has the most."""


def _find_listed(resolver: SourceResolver, uri: str, field: str) -> tuple[ManifestFile, ...] | None:
    """Return the files of an adapter as its result's manifest lists them, relative to it; None without a manifest."""
    found = None
    for parent in parents(uri, _MAX_LEVELS):
        for manifest in _manifests_in(resolver, parent, field):
            found = f"{parent}/{MANIFEST}"
            # A result beside another one has its manifest in its own folder, whose name is in the files' paths.
            for root in (parent, parent.rpartition("/")[0]):
                if listed := list_adapter(manifest.files, local_name(uri, root)):
                    return listed
    if found is not None:
        raise RunError(
            Reason.INVALID_SPEC, f"{field}: {found} does not list {uri}; give the adapter that the manifest names"
        )
    return None


def _manifests_in(resolver: SourceResolver, parent: str, field: str) -> Iterator[ResultManifest]:
    """Yield the manifests of a folder that may be a result's; without permission to read it there are none."""
    store = resolver.open_store(parent, FieldRef(SecretRole.OUTPUT, field))
    for name in (MANIFEST, REJECTED_RECORD):
        try:
            yield ignore_unknown(ResultManifest, store.read(name, MAX_MANIFEST_BYTES), name)
        except ValueError:
            continue  # another program's; an adapter that no manifest lists is opened with a note only
        except RunError as error:
            if not isinstance(error, (MissingObjectError, ObjectTooLargeError)) and error.reason != Reason.S3_DENIED:
                raise


def local_name(uri: str, parent: str) -> str:
    """Return the path of a folder relative to one above it."""
    return uri.removeprefix(parent).strip("/")


def list_adapter(files: Sequence[ManifestFile], folder: str) -> tuple[ManifestFile, ...]:
    """Return the files of a manifest that are below a folder, relative to it; none if they are not an adapter's."""
    below = tuple(
        file.model_copy(update={"path": file.path.relative_to(folder)})
        for file in files
        if file.path.startswith(f"{folder}/")
    )
    return below if any(file.path == RECORD for file in below) else ()


def fetch_published(output: Store, digest: str, adapter: str, work: Path) -> Path:
    """Download an adapter of a result as the result's manifest lists it.

    Args:
        output: Output of the job.
        digest: Result digest.
        adapter: URI of the adapter, as its result names it.
        work: Folder for downloads.

    Raises:
        RunError: UPLOAD_FAILED if the manifest is missing or lists no such adapter, or a file is not what it lists.

    """
    root = f"{output.root}/{digest}"
    manifest = find_manifest_of(output, digest, adapter) if adapter.startswith(f"{root}/") else None
    folder = local_name(adapter, root)
    listed = list_adapter(manifest.files, folder) if manifest else ()
    if not listed:
        raise RunError(
            Reason.UPLOAD_FAILED, f"spec.output.uri: {root}/{MANIFEST} does not list the adapter {adapter}; restore it"
        )
    return fetch_listed(output, f"{digest}/{folder}", listed, work)


def fetch_listed(store: Store, folder: str, files: Sequence[ManifestFile], work: Path) -> Path:
    """Download listed files of a folder and return the local folder, which has these files only."""
    listing = "\n".join(f"{file.path} {file.size} {file.sha256}" for file in files)
    target = _new_target(listing, work)
    download_listed(store, folder, files, target)
    return target


def _fetch_unverified(store: Store, work: Path) -> Path:
    """Download all files but code and return their folder; a local folder is used in place, without links out of it."""
    entries = store.list()
    if isinstance(store, FileStore):
        return store.folder
    listing = "\n".join(f"{entry.path} {entry.size} {store.fingerprint(entry)}" for entry in entries)
    target = _new_target(listing, work)
    for entry in entries:
        file = entry.path.below(target)
        if not file.is_file() and not entry.path.endswith(_CODE):
            partial = file.with_name(f"{file.name}.part")
            store.download(entry.path, partial)
            partial.replace(file)
    return target


def _new_target(listing: str, work: Path) -> Path:
    return ObjectName(sha256_of(listing.encode())[:16]).below(work / "adapters")


def _read_record(store: Store, field: str) -> AdapterRecord:
    if not store.exists(RECORD):
        raise RunError(Reason.INVALID_SPEC, f"{field}: {_why_none(store)}")
    return _parse_record(store.read(RECORD, MAX_MANIFEST_BYTES), store, field)


def _parse_record(content: bytes, store: Store, field: str) -> AdapterRecord:
    try:
        return ignore_unknown(AdapterRecord, content, RECORD)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        location = ".".join(map(str, first["loc"])) or "content"
        raise RunError(
            Reason.INVALID_SPEC,
            f"{field}: {store.root}/{RECORD}: {location}: {first['msg']}; use the release that wrote it or a later one",
        ) from error


def _why_none(store: Store) -> str:
    """Say what a folder without an adapter record is, and what to give instead."""
    if not store.list("", no_log):
        return f"{store.root} holds no files; give the folder 'adapter' of a published result"
    if store.exists(MANIFEST):
        with contextlib.suppress(ValueError, LookupError, AttributeError, TypeError, RecursionError):
            content = parse_object(store.read(MANIFEST, MAX_MANIFEST_BYTES), MAX_MANIFEST_BYTES)
            adapter = str((content.get("result") or content)["adapter"])[:_SHOWN_CHARACTERS]
            return f"{store.root} is a result folder; its adapter is {adapter}"
    if store.exists(_SETTINGS):
        return (
            f"{store.root} is an adapter without {RECORD}, so its base and prompt format are unknown; load it with peft"
        )
    return f"{store.root} has no {RECORD}; give the folder 'adapter' of a published result"


def fetch_base(resolver: SourceResolver, record: AdapterRecord, given: str | None, work: Path) -> Path:
    """Download the base of an adapter, or the model that overrides it, and return its folder."""
    field_ref = _GIVEN_BASE if given else _RECORDED_BASE
    snapshot = _resolve_given(resolver, given) if given else _resolve_recorded(resolver, record)
    return snapshot.fetch([*text_files(snapshot.files), *weight_files(snapshot.files, field_ref)], work)


def _resolve_given(resolver: SourceResolver, uri: str) -> Snapshot:
    name, _, revision = uri.partition("@") if uri.startswith("hf://") else (uri, "", "")
    return resolver.resolve(name, revision or "main", _GIVEN_BASE)


def _resolve_recorded(resolver: SourceResolver, record: AdapterRecord) -> Snapshot:
    if record.base.startswith(CLAIM_SCHEME):
        raise RunError(
            Reason.MODEL_NOT_FOUND,
            f"the adapter's base is {record.base}, which only a cluster can mount; copy it and set --base-model",
        )
    snapshot = resolver.resolve(record.base, record.commit, _RECORDED_BASE)
    if snapshot.commit != record.commit:
        raise RunError(
            Reason.MODEL_NOT_FOUND,
            f"the files at {record.base} have changed since the adapter was trained; restore them, or set --base-model "
            "to use them as they are",
        )
    return snapshot
