"""Downloads a published adapter and its base, for merging and chat."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from qlora_api.names import CLAIM_SCHEME, SecretRole
from qlora_api.reasons import Reason
from qlora_api.report import AdapterRecord
from qlora_trainer.errors import RunError
from qlora_trainer.storage.local_store import FileStore
from qlora_trainer.storage.results import MANIFEST, RECORD
from qlora_trainer.storage.snapshots import Snapshot, SourceResolver, text_files, weight_files
from qlora_trainer.storage.store import FieldRef, Store, sha256_of

_READABLE: Final = ("file://", "s3://")
_SETTINGS: Final = "adapter_config.json"
"""The file by which peft recognizes an adapter."""
_RECORDED_BASE: Final = FieldRef(SecretRole.MODEL, "the adapter's base (--base-model overrides it)")
_GIVEN_BASE: Final = FieldRef(SecretRole.MODEL, "--base-model")


@dataclass(frozen=True)
class PublishedAdapter:
    """An adapter's files, and the record of its training."""

    uri: str
    folder: Path
    record: AdapterRecord


def open_adapter(resolver: SourceResolver, uri: str, field: str, work: Path) -> PublishedAdapter:
    """Download an adapter; raise RunError if it is not a published one. `field` names the option that gave its URI."""
    if not uri.startswith(_READABLE):
        raise RunError(Reason.INVALID_SPEC, f"{field}: {uri} is neither a folder nor an s3:// URI; download it first")
    store = resolver.open_store(uri, FieldRef(SecretRole.OUTPUT, field))
    record = _read_record(store, field)
    if record.method == "full":
        raise RunError(
            Reason.INVALID_SPEC,
            f"{field}: {store.root} was trained with method full and is a complete model; load it with transformers",
        )
    return PublishedAdapter(store.root, fetch_adapter(store, "", work), record)


def _read_record(store: Store, field: str) -> AdapterRecord:
    if not store.exists(RECORD):
        raise RunError(Reason.INVALID_SPEC, f"{field}: {_why_none(store)}")
    try:
        return AdapterRecord.model_validate_json(store.read(RECORD))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        location = ".".join(map(str, first["loc"])) or "content"
        raise RunError(
            Reason.INVALID_SPEC,
            f"{field}: {store.root}/{RECORD}: {location}: {first['msg']}; use the release that wrote it or a later one",
        ) from error


def _why_none(store: Store) -> str:
    """Say what a folder without an adapter record is, and what to give instead."""
    if not store.list():
        return f"{store.root} holds no files; give the folder 'adapter' of a published result"
    if store.exists(MANIFEST):
        content = json.loads(store.read(MANIFEST))
        return f"{store.root} is a result folder; its adapter is {(content.get('result') or content)['adapter']}"
    if store.exists(_SETTINGS):
        return (
            f"{store.root} is an adapter without {RECORD}, so its base and prompt format are unknown; load it with peft"
        )
    return f"{store.root} has no {RECORD}; give the folder 'adapter' of a published result"


def fetch_adapter(store: Store, path: str, work: Path) -> Path:
    """Download all files below a path and return their folder; a local folder is used in place."""
    if isinstance(store, FileStore):
        return store.folder / path
    entries = store.list(path)
    listing = "\n".join(f"{entry.path} {entry.size} {store.fingerprint(entry)}" for entry in entries)
    target = work / "adapters" / sha256_of(listing.encode())[:16]
    for entry in entries:
        file = target / entry.path.removeprefix(f"{path}/" if path else "")
        if not file.is_file():
            partial = file.with_name(f"{file.name}.part")
            store.download(entry.path, partial)
            partial.replace(file)
    return target


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
