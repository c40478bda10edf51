"""Files as a manifest lists them: described, downloaded and verified."""

import logging
from collections.abc import Sequence
from pathlib import Path

from qlora_api.object_names import ObjectName
from qlora_api.reasons import Reason
from qlora_api.report import ManifestFile
from qlora_trainer.errors import RunError
from qlora_trainer.storage.store import Store, sha256_of

log = logging.getLogger(__name__)


def describe_files(folder: Path) -> tuple[ManifestFile, ...]:
    """Return every file below a folder, sorted by path, with size and SHA-256."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return tuple(
        ManifestFile(
            path=ObjectName(path.relative_to(folder).as_posix()), size=path.stat().st_size, sha256=sha256_of(path)
        )
        for path in paths
    )


def sizes_below(output: Store, folder: str) -> dict[str, int]:
    """Return the size in bytes of each object below a folder; names that nothing of ours has are logged and skipped."""
    return {entry.path: entry.size for entry in output.list(folder, log.warning)}


def download_listed(output: Store, folder: str, files: Sequence[ManifestFile], target: Path) -> None:
    """Download the files that a manifest lists and nothing else.

    Args:
        output: Store with the files.
        folder: Folder in the store that the files' paths are relative to; may be empty.
        files: The files, with size and SHA-256.
        target: Local folder.

    Raises:
        RunError: UPLOAD_FAILED if a file is missing or has another size or content.

    """
    sizes = sizes_below(output, folder)
    for file in files:
        path, local = f"{folder}/{file.path}".removeprefix("/"), file.path.below(target)
        if not _matches(local, file) and sizes.get(path) == file.size:
            output.download(path, local)
        if not _matches(local, file):
            raise RunError(
                Reason.UPLOAD_FAILED,
                f"{output.root}/{path} is missing or does not match size and SHA-256 in its manifest: somebody changed "
                "it after it was uploaded; restore it, or train again",
            )


def _matches(local: Path, file: ManifestFile) -> bool:
    return local.is_file() and local.stat().st_size == file.size and sha256_of(local) == file.sha256
