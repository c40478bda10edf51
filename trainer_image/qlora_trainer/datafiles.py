"""The files that a dataset's URI means, brought onto this computer."""

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from qlora_api.names import Reason
from qlora_trainer.errors import RunError
from qlora_trainer.files import KNOWN_NAMES, FileError, form_of, is_data_file
from qlora_trainer.snapshot import Places
from qlora_trainer.store import FileStore, Owner, Store, split_uri

_HUB_URI: Final = re.compile(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?/(.*)")


def local_files(places: Places, uri: str, owner: Owner, work: Path) -> tuple[Path, ...]:
    """Return the local copy of a file, or of every data file below a URI that ends with '/'."""
    if uri.startswith("hf://"):
        return _from_hub(places, uri, owner, work)
    folder, name = (uri, "") if uri.endswith("/") else split_uri(uri)
    store = places.store(folder, owner)
    names = (entry.path for entry in store.list()) if not name else ()
    return tuple(_local_copy(store, file, work) for file in _chosen(name, names, uri, owner))


def _from_hub(places: Places, uri: str, owner: Owner, work: Path) -> tuple[Path, ...]:
    match = _HUB_URI.fullmatch(uri)
    if match is None:
        raise RunError(
            owner.not_found, f"{owner.field}: '{uri}' has no file; write hf://datasets/organisation/name/file.jsonl"
        )
    name, revision, path = match[1], match[2] or "main", match[3]
    wanted = "" if path.endswith("/") else path
    snapshot = places.resolve(f"hf://{name}", revision, owner, kind="dataset")
    if wanted and wanted not in snapshot.files:
        raise RunError(
            owner.not_found, f"{owner.field}: {name}@{snapshot.commit} has no file '{wanted}'; correct the URI"
        )
    files = _chosen(wanted, (file for file in snapshot.files if file.startswith(path)), uri, owner)
    root = snapshot.fetch(files, work)
    return tuple(root / file for file in files)


def _chosen(name: str, names: Iterable[str], uri: str, owner: Owner) -> tuple[str, ...]:
    """Return the one file that is named, or the data files among all; either must be of a known form."""
    if name:
        try:
            form_of(name)
        except FileError as error:
            raise RunError(
                Reason.DATASET_INVALID, f"{owner.field}: {error}, or end the URI with '/' to read every file below it"
            ) from error
        return (name,)
    files = tuple(sorted(filter(is_data_file, names)))
    if not files:
        raise RunError(owner.not_found, f"{owner.field}: there is no file below {uri} that is named {KNOWN_NAMES}")
    return files


def _local_copy(store: Store, name: str, work: Path) -> Path:
    """Return where a file is; those of this computer are read in place."""
    if isinstance(store, FileStore):
        return store.place(name)
    target = work / "datasets" / hashlib.sha256(store.root.encode()).hexdigest()[:16] / name
    store.download(name, target)
    return target
