"""A result's place in the output: who is looking for one starts here."""

import json
from pathlib import Path
from typing import Final, Literal, TypeAlias

from qlora_api.report import ManifestFile, MergedManifest, ResultManifest
from qlora_api.result import Result
from qlora_api.runconfig import PrepareConfig, RunConfig
from qlora_api.v1alpha1 import MergeBase, OutputSpec, QLoRAJobSpec
from qlora_trainer.storage.credentials import load_secrets
from qlora_trainer.storage.snapshots import SourceResolver
from qlora_trainer.storage.store import OUTPUT_FIELD, ObjectExistsError, Store, sha256_of

MANIFEST: Final = "manifest.json"
"""Written last and as one object: who finds it finds a complete result."""
IfExists: TypeAlias = Literal["Skip", "Fail", "Overwrite"]
"""spec.output.ifExists."""
LATEST: Final = "latest.json"
"""Points to the newest manifest of a job."""
RECORD: Final = "qlora.json"
"""Beside the weights: what merging and asking need to know."""
REJECTED: Final = "rejected"
"""Folder of a result that its gate refused."""
REJECTED_RECORD: Final = f"{REJECTED}/rejected.json"
"""The manifest that such a result would have, written last as well."""


def open_output(resolver: SourceResolver, spec: QLoRAJobSpec, job: str) -> Store:
    """Return the folder of a job's results; paths in it start with a digest."""
    return resolver.open_store(f"{spec.output.uri.rstrip('/')}/{job}", OUTPUT_FIELD)


def open_own_output(config: PrepareConfig | RunConfig) -> Store:
    """Return the same folder for a thread that must not depend on what the others do, or hang in."""
    places = SourceResolver(config.platform, load_secrets(config.spec, config.namespace))
    return open_output(places, config.spec, config.job)


def find_manifest(output: Store, digest: str) -> ResultManifest | None:
    """Return the manifest of a published result."""
    return _find(output, f"{digest}/{MANIFEST}")


def find_reusable(output: Store, digest: str, if_exists: IfExists, run: str) -> ResultManifest | None:
    """Return the manifest after which there is nothing to train: with Overwrite only a run's own."""
    found = find_manifest(output, digest)
    return found if found is not None and is_reusable(found, if_exists, run) else None


def is_reusable(manifest: ResultManifest, if_exists: IfExists, run: str) -> bool:
    """Return whether a result stands: with Overwrite only that of this very run does, and without a name none is."""
    return if_exists != "Overwrite" or (run != "" and manifest.run == run)


def find_rejected(output: Store, digest: str) -> ResultManifest | None:
    """Return the record of a result that a gate refused."""
    return _find(output, f"{digest}/{REJECTED_RECORD}")


def merged_folder(base: MergeBase) -> str:
    """Return the folder of a merged model, beside the adapter's."""
    return f"merged/{base}"


def find_merged(output: Store, digest: str, base: MergeBase, adapter: str) -> str | None:
    """Return the URI of an adapter's merged model, if there is a complete one; a replaced adapter's is none."""
    path = f"{digest}/{merged_folder(base)}/{MANIFEST}"
    if not output.exists(path):
        return None
    found = MergedManifest.model_validate_json(output.read(path))
    return found.model if found.adapter == adapter else None


def with_merged(output: Store, digest: str, spec: OutputSpec, result: Result) -> Result | None:
    """Return a published result with the merged model that is asked for, or None where that is still missing."""
    if spec.merged == "none":
        return result
    merged = find_merged(output, digest, spec.merge_base, result.adapter)
    return result.model_copy(update={"merged": merged}) if merged else None


def _find(output: Store, path: str) -> ResultManifest | None:
    return ResultManifest.model_validate_json(output.read(path)) if output.exists(path) else None


def put_manifest(output: Store, manifest: ResultManifest) -> ResultManifest:
    """Publish what the manifest lists, and return it, or that of somebody faster."""
    try:
        output.put(f"{manifest.digest}/{MANIFEST}", manifest_json(manifest), if_none_match=True)
    except ObjectExistsError:
        return find_manifest(output, manifest.digest) or manifest
    return manifest


def replace_manifest(output: Store, manifest: ResultManifest) -> None:
    """Publish what the manifest lists in the place of an earlier result: one object, so that readers see either."""
    output.put(f"{manifest.digest}/{MANIFEST}", manifest_json(manifest))


def remove_replaced(output: Store, former: ResultManifest) -> None:
    """Remove the files that only a replaced manifest listed, and models that were merged from its adapter."""
    standing = find_manifest(output, former.digest) or former
    listed = {file.path for file in standing.files}
    for file in former.files:
        if file.path not in listed:
            output.delete(f"{former.digest}/{file.path}")
    if former.result.adapter != standing.result.adapter:
        # The manifests of merged models come after their files in a listing, and must go first.
        entries = output.list(f"{former.digest}/merged")
        for entry in sorted(entries, key=lambda entry: not entry.path.endswith(f"/{MANIFEST}")):
            output.delete(entry.path)


def manifest_json(manifest: ResultManifest | MergedManifest) -> bytes:
    """Return a manifest as a file's content."""
    return manifest.model_dump_json(by_alias=True, indent=2).encode()


def update_latest(output: Store, digest: str, prefix: str) -> None:
    """Let the job's pointer name the manifest of its newest result."""
    output.put(LATEST, json.dumps({"digest": digest, "manifest": f"{prefix}/{MANIFEST}"}).encode())


def describe_files(folder: Path) -> tuple[ManifestFile, ...]:
    """Return every file under a folder, with size and SHA-256."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return tuple(
        ManifestFile(path=path.relative_to(folder).as_posix(), size=path.stat().st_size, sha256=sha256_of(path))
        for path in paths
    )
