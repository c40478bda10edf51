"""The folder of a job's results, <output.uri>/<job>, and the manifests in it."""

import json
from typing import Final

from qlora_api.report import Manifest
from qlora_api.v1alpha1 import QLoRAJobSpec
from qlora_trainer.snapshot import Places
from qlora_trainer.store import OUTPUT, Store

MANIFEST: Final = "manifest.json"
"""Written last, and only once: who finds it finds a complete result."""
LATEST: Final = "latest.json"
"""Points to the newest manifest of a job."""


def open_output(places: Places, spec: QLoRAJobSpec, job: str) -> Store:
    """Return the folder of a job's results; paths in it start with a digest."""
    return places.store(f"{spec.output.uri.rstrip('/')}/{job}", OUTPUT)


def find_manifest(output: Store, digest: str) -> Manifest | None:
    """Return the manifest of a published result."""
    path = f"{digest}/{MANIFEST}"
    return Manifest.model_validate_json(output.read(path)) if output.exists(path) else None


def point_latest(output: Store, digest: str, prefix: str) -> None:
    """Let the job's pointer name the manifest of its newest result."""
    output.put(LATEST, json.dumps({"digest": digest, "manifest": f"{prefix}/{MANIFEST}"}).encode())
