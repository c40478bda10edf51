"""Finds a published result in a folder or below an s3:// URI, without a cluster."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from pydantic import BaseModel

from qlora_api.report import MAX_MANIFEST_BYTES, ResultManifest, RunReport
from qlora_api.tolerant_reader import ignore_unknown
from qlora_cli.local.output_store import MAX_REPORT_BYTES, OutputError, OutputStore, open_output_store
from qlora_cli.manifests.local_paths import is_folder_or_uri
from qlora_cli.uris import to_display_path, to_uri

MANIFEST: Final = "manifest.json"
REPORT: Final = "report/report.json"
MERGED: Final = "merged"
_PARTS: Final = {"adapter": 1, "report": 1, "report.html": 2, "report.json": 2, MANIFEST: 1}
"""Last names of URIs inside a result, and how many levels above them it is."""
_RESULT_LEVELS: Final = ("", "*/", "*/*/")
"""Folders between an output and a result: its name and its digest."""
_NAME: Final = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
"""Names of QLoRAJobs; whoever can write to the bucket could have chosen another, which becomes a path here."""
Content = TypeVar("Content", bound=BaseModel)


@dataclass(frozen=True)
class PublishedResult:
    """A result, where it is now; it may have been copied since it was published."""

    uri: str
    report: RunReport
    merged: str | None
    """URI of the merged model, if there is one."""

    @property
    def adapter(self) -> str:
        """Return the URI of its adapter."""
        return f"{self.uri}/adapter"


def is_result(text: str) -> bool:
    """Return whether an argument is a folder or URI with results, and not the name of a QLoRAJob."""
    if is_folder_or_uri(text):
        return True
    return any(next(Path(text).glob(f"{level}{MANIFEST}"), None) is not None for level in _RESULT_LEVELS)


def find_result(text: str, endpoint: str | None, note: Callable[[str], None]) -> PublishedResult:
    """Return the newest result in a folder or below a URI.

    Args:
        text: Folder or URI of an output, a result, its adapter or its report.
        endpoint: URL of an S3-compatible server; None: AWS.
        note: Called with a message if there are several results.

    Raises:
        OutputError: There is none, or it cannot be read.

    """
    uri = _above(to_uri(text).rstrip("/"))
    if uri.startswith("file://") and not Path(to_display_path(uri)).is_dir():
        raise OutputError(f"{text} is no folder; give the output of a run, such as out, or the name of a QLoRAJob")
    with open_output_store(uri, endpoint) as files:
        paths = frozenset(str(entry.path) for entry in files.list(on_refused=lambda _message: None))
        folders = [path.removesuffix(MANIFEST) for path in paths if _is_result(path, paths)]
        if not folders:
            raise OutputError(
                f"{text} has no published result, which has a {MANIFEST}; give the output of a run that was published"
            )
        newest = max(folders, key=lambda folder: _read(files, f"{folder}{MANIFEST}", ResultManifest).created_at)
        if len(folders) > 1:
            note(f"{text} has {len(folders)} results; this is the newest, {newest.rstrip('/')}")
        report = _read(files, f"{newest}{REPORT}", RunReport)
    if not _NAME.fullmatch(report.job):
        raise OutputError(f"{newest}{REPORT} names the run {report.job!r}, and no QLoRAJob has such a name; check it")
    root = f"{uri}/{newest}".rstrip("/")
    return PublishedResult(root, report, _merged_in(root, newest, paths))


def _above(uri: str) -> str:
    for _ in range(_PARTS.get(uri.rpartition("/")[2], 0)):
        uri = uri.rpartition("/")[0]
    return uri


def _is_result(path: str, paths: frozenset[str]) -> bool:
    return path.rpartition("/")[2] == MANIFEST and f"{path.removesuffix(MANIFEST)}{REPORT}" in paths


def _merged_in(root: str, folder: str, paths: Iterable[str]) -> str | None:
    start = f"{folder}{MERGED}/"
    found = sorted(path.removeprefix(folder) for path in paths if path.startswith(start) and path.endswith(MANIFEST))
    return f"{root}/{found[-1].removesuffix(f'/{MANIFEST}')}" if found else None


def _read(files: OutputStore, path: str, kind: type[Content]) -> Content:
    try:
        return ignore_unknown(
            kind, files.read(path, MAX_MANIFEST_BYTES if path.endswith(MANIFEST) else MAX_REPORT_BYTES), path
        )
    except ValueError as error:
        raise OutputError(f"{path} is not what a run publishes; give another result") from error
