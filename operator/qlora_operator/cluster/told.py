"""QLoRAJobs as the watch told of them last, until their next pass: it need not read them again to confirm them."""

import json
import zlib
from typing import Final

from qlora_operator.cluster.parse import Json, parse_job
from qlora_operator.values import JobRef, RawJob

FASTEST: Final = 1
"""zlib's level: a finished QLoRAJob of 8 kB takes 2 kB; ten thousand parsed ones would be 150 MB."""


class Told:
    """What the watch told, until somebody takes it."""

    def __init__(self) -> None:
        self._told: dict[JobRef, bytes] = {}

    def saw(self, ref: JobRef, item: Json) -> None:
        """Remember a QLoRAJob in place of what was told before."""
        metadata = {name: value for name, value in item["metadata"].items() if name != "managedFields"}
        self._told[ref] = zlib.compress(json.dumps({**item, "metadata": metadata}).encode(), FASTEST)

    def take(self, ref: JobRef) -> RawJob | None:
        """Return it once: whoever comes back has something newer to read."""
        text = self._told.pop(ref, None)
        return parse_job(json.loads(zlib.decompress(text))) if text else None

    def forget(self, ref: JobRef) -> None:
        """Drop what was told of a QLoRAJob."""
        self._told.pop(ref, None)
