"""A result's place in the output: who is looking for one starts here."""

import json
from typing import Final

from qlora_api.report import Manifest, MergedManifest
from qlora_api.result import Result
from qlora_api.v1alpha1 import MergeBase, OutputSpec, QLoRAJobSpec
from qlora_trainer.snapshot import Places
from qlora_trainer.store import OUTPUT, AlreadyThereError, Store

MANIFEST: Final = "manifest.json"
"""Written last and only once: who finds it finds a complete result."""
LATEST: Final = "latest.json"
"""Points to the newest manifest of a job."""
RECORD: Final = "qlora.json"
"""Beside the weights: what merging and asking need to know."""
REJECTED: Final = "rejected"
"""Folder of a result that its gate refused."""
REJECTED_RECORD: Final = f"{REJECTED}/rejected.json"
"""The manifest that such a result would have, written last as well."""


def open_output(places: Places, spec: QLoRAJobSpec, job: str) -> Store:
    """Return the folder of a job's results; paths in it start with a digest."""
    return places.store(f"{spec.output.uri.rstrip('/')}/{job}", OUTPUT)


def find_manifest(output: Store, digest: str) -> Manifest | None:
    """Return the manifest of a published result."""
    return _find(output, f"{digest}/{MANIFEST}")


def find_rejected(output: Store, digest: str) -> Manifest | None:
    """Return the record of a result that a gate refused."""
    return _find(output, f"{digest}/{REJECTED_RECORD}")


def merged_place(base: MergeBase) -> str:
    """Return the folder of a merged model, beside the adapter's."""
    return f"merged/{base}"


def find_merged(output: Store, digest: str, base: MergeBase) -> str | None:
    """Return the URI of a merged model, if there is a complete one."""
    path = f"{digest}/{merged_place(base)}/{MANIFEST}"
    return MergedManifest.model_validate_json(output.read(path)).model if output.exists(path) else None


def with_merged(output: Store, digest: str, spec: OutputSpec, result: Result) -> Result | None:
    """Return a published result with the merged model that is asked for, or None where that is still missing."""
    if spec.merged == "none":
        return result
    merged = find_merged(output, digest, spec.merge_base)
    return result.model_copy(update={"merged": merged}) if merged else None


def _find(output: Store, path: str) -> Manifest | None:
    return Manifest.model_validate_json(output.read(path)) if output.exists(path) else None


def put_manifest(output: Store, manifest: Manifest) -> Manifest:
    """Publish what the manifest lists, and return it, or that of somebody faster."""
    try:
        output.put(f"{manifest.digest}/{MANIFEST}", manifest_json(manifest), if_none_match=True)
    except AlreadyThereError:
        return find_manifest(output, manifest.digest) or manifest
    return manifest


def manifest_json(manifest: Manifest | MergedManifest) -> bytes:
    """Return a manifest as a file's content."""
    return manifest.model_dump_json(by_alias=True, indent=2).encode()


def point_latest(output: Store, digest: str, prefix: str) -> None:
    """Let the job's pointer name the manifest of its newest result."""
    output.put(LATEST, json.dumps({"digest": digest, "manifest": f"{prefix}/{MANIFEST}"}).encode())
