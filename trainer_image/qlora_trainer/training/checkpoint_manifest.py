"""Manifests of checkpoints, and which of them a run may resume from: whoever can write the bucket can write one."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Final, Literal

from pydantic import AwareDatetime, Field

from qlora_api.base import ApiModel, Sha256
from qlora_api.report import ManifestFile

_NAME: Final = re.compile(r"step-(?P<step>[0-9]{6,9})-a(?P<attempt>[0-9]{1,9})")
_SHOWN_DIGITS: Final = 16
"""Digits of a SHA-256 in a message; the comparison is of all 64."""


@dataclass(frozen=True, order=True)
class CheckpointId:
    """Step and attempt of a checkpoint; the attempt keeps overlapping attempts from writing the same object.

    Ordered by age: at the same step, the checkpoint of the later attempt is the newer one.
    """

    step: int
    attempt: int

    @property
    def name(self) -> str:
        """Return the folder name."""
        return f"step-{self.step:06}-a{self.attempt}"

    @classmethod
    def parse(cls, name: str) -> "CheckpointId | None":
        """Parse a folder name; None if it is not a checkpoint's."""
        match = _NAME.fullmatch(name)
        found = cls(int(match["step"]), int(match["attempt"])) if match else None
        return found if found is not None and found.name == name else None  # no further leading zeros


Digests = Mapping[str, str]
"""SHA-256 of manifests, by the names of their folders."""


class CheckpointManifest(ApiModel):
    """manifest.json of a checkpoint; it is uploaded last, so if it exists, all files do."""

    step: int
    time: AwareDatetime
    """When all files were uploaded."""
    verified: bool
    """Whether the object store confirmed the SHA-256 of every file."""
    files: tuple[ManifestFile, ...]
    earlier: dict[Annotated[str, Field(max_length=32)], Sha256] = Field(default={})
    """SHA-256 of the manifests of the checkpoints before it, by the names of their folders. Who knows the digest of
    this manifest knows theirs, and can resume from them if a file of this one is damaged."""
    base_evaluation: Sha256 | Literal[""] = ""
    """SHA-256 of the evaluation of the base, which a run that resumes does not repeat; empty if it is not stored."""


def check_digest(name: str, digest: str, trusted: Digests | None) -> None:
    """Raise ValueError unless the manifest of a checkpoint is one that an earlier attempt wrote.

    Args:
        name: The checkpoint's folder.
        digest: SHA-256 of the manifest, as it is now.
        trusted: What is known of the manifests of earlier attempts; None if nothing is, so that any is accepted.

    """
    if trusted is None:
        return
    if name not in trusted:
        raise ValueError("no earlier attempt reported it, so who wrote it is not known")
    if digest != trusted[name]:
        raise ValueError(
            f"its manifest was replaced: it has SHA-256 {digest[:_SHOWN_DIGITS]}…, and an earlier attempt reported "
            f"{trusted[name][:_SHOWN_DIGITS]}…; restrict who can write to the output"
        )
