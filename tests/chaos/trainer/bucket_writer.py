"""Somebody who can write the bucket of an output: what they plant, change and forge."""

import contextlib
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, Final

import torch
from safetensors.torch import load, save

from tests.cluster.services.s3 import S3

_MANIFEST: Final = re.compile(r"/[0-9a-f]{16}/manifest\.json$")
OTHERS: Final = 666.0
"""Every weight of somebody else."""
CODE: Final = b"import pathlib; pathlib.Path('PWNED').touch()"
HOSTILE_KEYS: Final = ("../evil", "checkpoints//etc/x", "checkpoints/step-000009-a9//x", "adapter/evil.py", "a\x1b[2J")
"""Below the result's prefix."""


class Attacker:
    """Somebody with the keys of the output's bucket."""

    def __init__(self, s3: S3, bucket: str) -> None:
        self.client, self.bucket, self.prefix = s3.client(), bucket, ""

    def objects(self, contains: str = "") -> dict[str, bytes]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket)
        keys = [found["Key"] for page in pages for found in page.get("Contents", ()) if contains in found["Key"]]
        found = {}
        for key in keys:
            with contextlib.suppress(self.client.exceptions.NoSuchKey):  # the server lists some names otherwise
                found[key] = self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read()
        return found

    def write(self, key: str, content: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=key, Body=content)

    def write_all(self, objects: dict[str, bytes]) -> None:
        for key, content in objects.items():
            self.write(key, content)

    def delete(self, key: str) -> None:
        self.client.delete_object(Bucket=self.bucket, Key=key)

    def restore(self, objects: dict[str, bytes]) -> None:
        for key in self.objects().keys() - objects.keys():
            self.delete(key)
        self.write_all(objects)

    def plant_names(self) -> None:
        """Write objects whose names lead elsewhere, or are those of code; the server refuses some itself."""
        for name in HOSTILE_KEYS:
            try:
                self.write(f"{self.prefix}/{name}", CODE)
            except self.client.exceptions.ClientError:
                continue

    def forge_checkpoints(self) -> None:
        """Replace the weights of all checkpoints, sign for them, and offer a copy with a higher attempt."""
        for key, content in self.objects("adapter.safetensors").items():
            if "/checkpoints/" in key:
                self._forge_checkpoint(key.rpartition("/")[0], content)

    def _forge_checkpoint(self, folder: str, weights: bytes) -> None:
        self.write(f"{folder}/adapter.safetensors", others(weights))
        manifest: Any = json.loads(self.objects(f"{folder}/manifest.json")[f"{folder}/manifest.json"])
        for file in manifest["files"]:
            content = self.objects(f"{folder}/{file['path']}")[f"{folder}/{file['path']}"]
            file |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        self.write(f"{folder}/manifest.json", json.dumps(manifest).encode())
        for key, content in self.objects(f"{folder}/").items():
            self.write(key.replace("-a1/", "-a99/"), content)


def others(content: bytes) -> bytes:
    """Return a safetensors file with other weights of the same size."""
    return save({name: torch.full_like(tensor, OTHERS) for name, tensor in load(content).items()}, {"format": "pt"})


def forge_result(published: Mapping[str, bytes], change: Mapping[str, Any], job: str = "") -> dict[str, bytes]:
    """Return a complete result with the weights of somebody else, signed for, in place of one or of another job's."""
    (key,) = filter(_MANIFEST.search, published)
    prefix, manifest = key.rpartition("/")[0], json.loads(published[key])
    forged = {name: content for name, content in published.items() if "/adapter/" in name or "/report/" in name}
    for file in manifest["files"]:
        name = f"{prefix}/{file['path']}"
        forged[name] = others(forged[name]) if name.endswith(".safetensors") else forged[name]
        file |= {"size": len(forged[name]), "sha256": hashlib.sha256(forged[name]).hexdigest()}
    forged[key] = json.dumps(manifest | change).encode()
    if not job:
        return forged
    former = f"/{manifest['job']}/"
    forged[key] = json.dumps({**manifest, **change, "job": job}).replace(former, f"/{job}/").encode()
    return {name.replace(former, f"/{job}/"): content for name, content in forged.items()}
