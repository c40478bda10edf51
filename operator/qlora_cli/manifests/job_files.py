"""Reads the QLoRAJobs of a file: with `--set`, and with local paths resolved from the manifest's folder."""

from collections.abc import Iterable
from pathlib import Path

from qlora_api.escapes import escape_line
from qlora_cli.manifests.classes import is_class
from qlora_cli.manifests.foreign_configs import describe_foreign
from qlora_cli.manifests.loader import is_qlorajob
from qlora_cli.manifests.local_paths import resolve_local_paths
from qlora_cli.manifests.overrides import Override, apply_overrides
from qlora_cli.manifests.yaml_documents import STDIN, Document, YamlError, name_of, read_documents


def read_jobs(file: str, overrides: Iterable[Override] = ()) -> list[Document]:
    """Return the QLoRAJobs of a file, or of standard input for '-'; documents of other kinds are ignored.

    Raises:
        YamlError: The file cannot be read, or has no QLoRAJob; the message says what it has, and how to begin.
        OverrideError: A field cannot be set.

    """
    documents = read_documents(file)
    jobs = [document for document in documents if is_qlorajob(document)]
    if not jobs:
        raise YamlError(_describe_without_jobs(file, documents))
    return _resolve(file, jobs, tuple(overrides))


def read_manifests(file: str, overrides: Iterable[Override] = ()) -> list[Document]:
    """Return the QLoRAJobs and QLoRAClasses of a file, in its order; the errors are those of `read_jobs`."""
    documents = read_documents(file)
    found = [document for document in documents if is_qlorajob(document) or is_class(document)]
    if not found:
        raise YamlError(_describe_without_jobs(file, documents))
    return _resolve(file, found, tuple(overrides))


def _resolve(file: str, documents: list[Document], overrides: tuple[Override, ...]) -> list[Document]:
    base = Path.cwd() if file == STDIN else Path(file).parent
    return [
        document if is_class(document) else resolve_local_paths(apply_overrides(document, overrides), base)
        for document in documents
    ]


def read_single_job(file: str, overrides: Iterable[Override] = ()) -> Document:
    """Return the one QLoRAJob of a file.

    Raises:
        YamlError: As `read_jobs`, or there are several.

    """
    jobs = read_jobs(file, overrides)
    if len(jobs) != 1:
        raise YamlError(f"{escape_line(name_of(file))}: has {len(jobs)} QLoRAJobs; pass a file with one")
    return jobs[0]


def _describe_without_jobs(file: str, documents: list[Document]) -> str:
    for document in documents:
        if (found := describe_foreign(document.value)) is not None:
            return f"{document.position_of(())}: {found}"
    kinds = sorted({str(document.value.get("kind")) for document in documents if isinstance(document.value, dict)})
    contained = f", only {escape_line(', '.join(kinds))}" if kinds else ""
    return f"{escape_line(name_of(file))}: contains no QLoRAJob{contained}; write a manifest with qlora init"
