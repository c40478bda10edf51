"""Finds a published result in a folder or below an s3:// URI, without a cluster."""

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from pydantic import BaseModel

from qlora_api.foreign_files import open_regular
from qlora_api.names import MAX_JOB_NAME
from qlora_api.report import MAX_MANIFEST_BYTES, ManifestFile, ResultManifest, RunReport
from qlora_api.tolerant_reader import ignore_unknown
from qlora_api.units import MIB
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
_READABLE: Final = ("file://", "s3://")
Content = TypeVar("Content", bound=BaseModel)


@dataclass(frozen=True)
class PublishedResult:
    """A result, where it is now; it may have been copied since it was published."""

    uri: str
    report: RunReport
    merged: str | None
    """URI of the merged model, if there is one."""
    digests: Mapping[str, str]
    """SHA-256 of each file that the manifest lists, by its path relative to the URI."""

    @property
    def adapter(self) -> str:
        """Return the URI of its adapter."""
        return f"{self.uri}/adapter"


def is_result(text: str) -> bool:
    """Return whether an argument is a folder or URI with results, and not the name of a QLoRAJob."""
    if is_folder_or_uri(text):
        return True
    with contextlib.suppress(OSError, ValueError):  # such as a name that is too long for a file
        return any(next(Path(text).glob(f"{level}{MANIFEST}"), None) is not None for level in _RESULT_LEVELS)
    return False


def find_result(text: str, endpoint: str | None, note: Callable[[str], None]) -> PublishedResult:
    """Return the newest result in a folder or below a URI.

    Args:
        text: Folder or URI of an output, a result, its adapter or its report.
        endpoint: URL of an S3-compatible server; None: AWS.
        note: Called with a message if there are several results.

    Raises:
        OutputError: There is none, or it cannot be read.

    """
    uri = _above(to_uri(text, "NAME").rstrip("/"))
    if not uri.startswith(_READABLE):
        raise OutputError(f"NAME: {text} is neither a folder nor an s3:// URI; download it first, and give the folder")
    if uri.startswith("file://") and not Path(to_display_path(uri)).is_dir():
        raise OutputError(f"{text} is no folder; give the output of a run, such as out, or the name of a QLoRAJob")
    with open_output_store(uri, endpoint) as files:
        paths = frozenset(str(entry.path) for entry in files.list(on_refused=lambda _message: None))
        with_report = frozenset(_folders_of_reports(paths))
        folders = [path.removesuffix(MANIFEST) for path in paths if _is_result(path, with_report)]
        if not folders:
            raise OutputError(
                f"{text} has no published result, which has a {MANIFEST}; give the output of a run that was published"
            )
        newest, manifest = _newest(files, sorted(folders), note)
        if len(folders) > 1:
            note(f"{text} has {len(folders)} results; this is the newest, {newest.rstrip('/')}")
        start = _folder_of_files(manifest.files)
        folder = f"{newest}{start}"
        digests = {file.path.removeprefix(start): file.sha256 for file in manifest.files}
        content = files.read(f"{folder}{REPORT}", MAX_REPORT_BYTES)
    check_listed(digests, REPORT, content)
    report = _parse(RunReport, content, f"{folder}{REPORT}")
    if len(report.job) > MAX_JOB_NAME or not _NAME.fullmatch(report.job):
        shown = report.job[: MAX_JOB_NAME + 1]
        raise OutputError(f"{folder}{REPORT} names the run {shown!r}, and no QLoRAJob has such a name; check it")
    merged = _merged_in(f"{uri}/{newest}".rstrip("/"), newest, paths)
    return PublishedResult(f"{uri}/{folder}".rstrip("/"), report, merged, digests)


def _newest(files: OutputStore, folders: Sequence[str], note: Callable[[str], None]) -> tuple[str, ResultManifest]:
    """Return the newest of several results, keeping one manifest at a time; what is no manifest hides no other."""
    found: tuple[str, ResultManifest] | None = None
    problem: OutputError | None = None
    for folder in folders:
        try:
            manifest = _read_manifest(files, f"{folder}{MANIFEST}")
        except OutputError as error:
            problem = error
            if len(folders) > 1:
                note(str(error))
        else:
            if found is None or manifest.created_at > found[1].created_at:
                found = folder, manifest
    if found is None:
        raise problem or OutputError("there is no result")
    return found


def check_listed(digests: Mapping[str, str], path: str, content: bytes) -> None:
    """Check that a file of a result is the one that its manifest lists.

    Args:
        digests: SHA-256 of each file that the manifest lists, by its path.
        path: Path relative to the result.
        content: What is there.

    Raises:
        OutputError: The manifest does not list the file, or with another SHA-256.

    """
    _check_digest(digests, path, hashlib.sha256(content).hexdigest())


def check_listed_file(digests: Mapping[str, str], path: str, file: Path) -> None:
    """Check a downloaded file as `check_listed` does its content, without reading it into memory."""
    digest = hashlib.sha256()
    with open_regular(file) as stream:
        while chunk := stream.read(MIB):
            digest.update(chunk)
    _check_digest(digests, path, digest.hexdigest())


def _check_digest(digests: Mapping[str, str], path: str, digest: str) -> None:
    expected = digests.get(path)
    if digest != expected:
        problem = "is not listed in" if expected is None else "does not have the SHA-256 of"
        raise OutputError(
            f"{path} {problem} the result's {MANIFEST}: somebody changed it after it was published; copy the result "
            "again, or train again"
        )


def _above(uri: str) -> str:
    for _ in range(_PARTS.get(uri.rpartition("/")[2], 0)):
        uri = uri.rpartition("/")[0]
    return uri


def _is_result(path: str, folders: frozenset[str]) -> bool:
    """Return whether a path is the manifest of a result, whose files are beside it or in a folder of their own."""
    return path.rpartition("/")[2] == MANIFEST and path.removesuffix(MANIFEST) in folders


def _folders_of_reports(paths: Iterable[str]) -> Iterator[str]:
    """Yield the folder that each report is in, and the one above it, where the manifest of a second upload is."""
    for path in paths:
        if path == REPORT or path.endswith(f"/{REPORT}"):
            folder = path.removesuffix(REPORT)
            yield folder
            yield folder.rstrip("/").rpartition("/")[0] + "/" if folder.count("/") > 1 else ""


def _folder_of_files(files: Iterable[ManifestFile]) -> str:
    """Return the folder of a result's files, relative to its manifest: they are not beside it if others were there."""
    return next((str(file.path).removesuffix(REPORT) for file in files if file.path.endswith(f"/{REPORT}")), "")


def _merged_in(root: str, folder: str, paths: Iterable[str]) -> str | None:
    start = f"{folder}{MERGED}/"
    found = sorted(path.removeprefix(folder) for path in paths if path.startswith(start) and path.endswith(MANIFEST))
    return f"{root}/{found[-1].removesuffix(f'/{MANIFEST}')}" if found else None


def _read_manifest(files: OutputStore, path: str) -> ResultManifest:
    return _parse(ResultManifest, files.read(path, MAX_MANIFEST_BYTES), path)


def _parse(kind: type[Content], content: bytes, path: str) -> Content:
    try:
        return ignore_unknown(kind, content, path)
    except ValueError as error:
        raise OutputError(f"{path} is not what a run publishes; give another result") from error
